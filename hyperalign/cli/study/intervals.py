"""Confidence intervals of win rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ...intervals import LEVEL, RESAMPLES, Interval, percentile_interval


def of_votes(points: Mapping[str, Sequence[float]], seed: int = 0) -> Interval:
    """Returns the interval of a win rate.

    It is Wilson's if every prompt has one vote. Otherwise it is the bootstrap's over prompts, because votes
    on one prompt are correlated. With few prompts the bootstrap underestimates their spread; so the interval
    is at least as wide as Wilson's.

    Args:
        points: by prompt, the points of one side in each vote: 1, 0.5 for a tie, or 0.
        seed: of the bootstrap.
    """
    votes = [won for prompt in points.values() for won in prompt]
    independent = wilson(sum(votes), len(votes))
    if len(votes) == len(points):
        return independent
    clustered = bootstrap(points, seed)
    return Interval(min(independent.low, clustered.low), max(independent.high, clustered.high))


def wilson(points: float, count: int) -> Interval:
    """Returns Wilson's score interval of a share (Wilson 1927, eq. 4.2 in Brown, Cai and DasGupta 2001).

    SciPy's binomtest has it for whole wins only, and a tie is half of one.

    Args:
        points: wins; a tie is half of one.
        count: comparisons, at least 1.
    """
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    share = points / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def bootstrap(points: Mapping[str, Sequence[float]], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Returns the percentile bootstrap interval of the win rate, resampling prompts with all their votes.

    Raters of the same images agree more than by chance: resampling single votes would make the interval too
    narrow, resampling whole prompts does not. If all prompts have the same mean the bootstrap has no spread,
    and the interval is Wilson's for as many votes as there are prompts.

    Args:
        points: by prompt, the points of one side in each vote: 1, 0.5 for a tie, or 0.
        seed: of the resampling.
        resamples: their number.
    """
    won = np.array([sum(votes) for votes in points.values()])
    count = np.array([len(votes) for votes in points.values()])
    if len(set((won / count).tolist())) == 1:
        return wilson(float(won[0] / count[0]) * len(points), len(points))

    def win_rate(won: NDArray[Any], count: NDArray[Any], axis: int) -> NDArray[Any]:
        return won.sum(axis=axis) / count.sum(axis=axis)

    return percentile_interval((won, count), win_rate, paired=True, seed=seed, resamples=resamples)
