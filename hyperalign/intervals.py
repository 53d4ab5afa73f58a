"""Bootstrap confidence intervals (Efron and Tibshirani 1993, section 13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 4000
BATCH = 500
"""How many resamples are in memory at once."""


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def percentile_interval(
    samples: Sequence[NDArray[Any]],
    statistic: Callable[..., NDArray[Any]],
    *,
    paired: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Returns the percentile bootstrap interval of a statistic.

    Args:
        samples: one or more, each of two values or more.
        statistic: of as many arrays, along their `axis`.
        paired: whether the n-th values of all samples are resampled together, or each sample on its own.
        seed: of the resampling.
        resamples: their number.
    """
    found: Any = stats.bootstrap(
        samples, statistic, paired=paired, vectorized=True, method="percentile", confidence_level=LEVEL,
        n_resamples=resamples, batch=BATCH, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Interval(float(found.confidence_interval.low), float(found.confidence_interval.high))
