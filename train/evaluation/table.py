"""The table of an evaluation: means of every set, and differences to the base with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperalign.intervals import Interval, percentile_interval

Numbers = NDArray[np.float64]

TASK_MEAN, IMAGE_WEIGHTED = "GenEval", "GenEval, image-weighted"
DIVERSITY, SECONDS = "diversity", "s/image"


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of the paired differences to the base."""

    value: float
    interval: Interval | None
    """None where there are too few prompts to resample."""

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and not self.interval.low <= 0.0 <= self.interval.high


@dataclass(frozen=True, slots=True)
class Cell:
    """A metric of a set."""

    value: float
    is_best: bool
    difference: Difference | None
    """None for the base, and for the seconds."""


@dataclass(frozen=True, slots=True)
class Column:
    """A metric."""

    name: str
    cells: dict[str, Cell | None]
    """By set; None where it is not known."""
    digits: int = 4


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of every set before it is a column.

    Its value is the mean over strata of the mean over prompts: one stratum for a reward, one a task for
    GenEval's official figure.
    """

    name: str
    prompts: Mapping[str, Numbers]
    """By set: one number a prompt (P,), the mean over its seeds."""
    strata: Sequence[Sequence[int]] = field(default_factory=list[Sequence[int]])
    """Indices of prompts; none for all prompts."""

    def value(self, name: str) -> float:
        """Returns the metric of a set."""
        return float(mean_of_means(*self._samples(self.prompts[name])))

    def difference(self, name: str, base: str) -> Difference:
        """Returns the paired difference to the base; the bootstrap resamples prompts within each stratum.

        A prompt's seeds are resampled with it: images of one prompt are more alike than those of two.
        """
        samples = self._samples(self.prompts[name] - self.prompts[base])
        interval = None
        if min(map(len, samples)) > 1:
            interval = percentile_interval(samples, mean_of_means)
        return Difference(float(mean_of_means(*samples)), interval)

    def _samples(self, values: Numbers) -> list[Numbers]:
        return [values[list(stratum)] for stratum in self.strata] or [values]


def mean_of_means(*samples: Numbers, axis: int = -1) -> Any:
    """Returns the mean of the samples' means along an axis."""
    return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)


def metrics(
    rewards: Mapping[str, Mapping[str, Numbers]],
    correct: Mapping[str, Numbers],
    tags: Sequence[str],
    diversity: Mapping[str, Numbers],
) -> list[Metric]:
    """Returns the metrics in the table's order.

    Args:
        rewards: by reward and set, the score of every image (P, S).
        correct: by set, whether every image is correct (P, S); empty without GenEval.
        tags: each prompt's task; empty without GenEval.
        diversity: by set, of every prompt (P,); empty without an encoder.
    """
    found = [Metric(name, _means(sets)) for name, sets in rewards.items()]
    if correct:
        shares = _means(correct)
        tasks = {tag: [n for n, other in enumerate(tags) if other == tag] for tag in dict.fromkeys(tags)}
        found += [Metric(TASK_MEAN, shares, list(tasks.values())), Metric(IMAGE_WEIGHTED, shares)]
        found += [Metric(tag.replace("_", " "), shares, [prompts]) for tag, prompts in tasks.items()]
    return found + ([Metric(DIVERSITY, diversity)] if diversity else [])


def _means(sets: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Returns the means over seeds."""
    return {name: values.mean(axis=1) for name, values in sets.items()}


def columns(found: Sequence[Metric], seconds: Mapping[str, float | None]) -> list[Column]:
    """Returns the table's columns; the first set of each metric is the base."""
    table = [column(metric) for metric in found]
    known = [value for value in seconds.values() if value is not None]
    if known:
        cells = {
            name: None if value is None else Cell(value, value == min(known), None)
            for name, value in seconds.items()
        }
        table.append(Column(SECONDS, cells, digits=2))
    return table


def column(metric: Metric) -> Column:
    """Returns a metric's column; greater is better in all of them."""
    base, *_ = metric.prompts
    values = {name: metric.value(name) for name in metric.prompts}
    best = max(values.values())
    return Column(
        metric.name,
        {
            name: Cell(value, value == best, None if name == base else metric.difference(name, base))
            for name, value in values.items()
        },
    )
