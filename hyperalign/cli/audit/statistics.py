"""Means, gaps and correlations with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev, variance
from typing import Any

from scipy import stats

LEVEL = 0.95
FEWEST = 3
"""The fewest values that have an interval."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric with its confidence interval, which is missing if there are too few values."""

    count: int
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


@dataclass(frozen=True, slots=True)
class Gap:
    """The difference between the groups with the highest and the lowest mean."""

    highest: str
    lowest: str
    difference: Estimate
    """Its interval holds for all pairs of groups at once (Bonferroni)."""
    effect_size: float
    """The difference in pooled standard deviations of the groups (Cohen's d), comparable between rewards."""


def mean(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Returns the mean with Student's interval."""
    if len(values) < FEWEST:
        return Estimate(len(values), fmean(values))
    error = stdev(values) / math.sqrt(len(values))
    return _student(len(values), fmean(values), error, len(values) - 1, level)


def difference(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Estimate:
    """Returns mean(first) - mean(second) of different images with Welch's interval."""
    value, count = fmean(first) - fmean(second), min(len(first), len(second))
    if count < FEWEST:
        return Estimate(count, value)
    parts = [variance(values) / len(values) for values in (first, second)]
    total = sum(parts)
    if total == 0.0:
        return Estimate(count, value, value, value)
    # Welch and Satterthwaite's formula in shares: squares of small variances would vanish, as in ttest_ind.
    shares = [part / total for part in parts]
    degrees = 1 / sum(
        share**2 / (len(values) - 1) for share, values in zip(shares, (first, second), strict=True)
    )
    return _student(count, value, math.sqrt(total), degrees, level)


def _student(count: int, value: float, error: float, degrees: float, level: float) -> Estimate:
    """Returns an estimate with Student's interval for a standard error."""
    half = error * float(stats.t.ppf((1 + level) / 2, degrees))
    return Estimate(count, value, value - half, value + half)


def paired(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Estimate:
    """Returns the mean of first - second of the same images, with its interval."""
    return mean([a - b for a, b in zip(first, second, strict=True)], level)


def largest_gap(groups: dict[str, Sequence[float]], same_images: bool = False) -> Gap | None:
    """Returns the gap between the groups with the highest and the lowest mean; None of fewer than two.

    Args:
        groups: scores by group.
        same_images: whether the n-th score of every group is of the same image.
    """
    filled = {name: values for name, values in groups.items() if values}
    if len(filled) < 2:
        return None
    ordered = sorted(filled, key=lambda name: fmean(filled[name]))
    lowest, highest = ordered[0], ordered[-1]
    pairs = len(list(combinations(filled, 2)))
    compare = paired if same_images else difference
    found = compare(filled[highest], filled[lowest], 1 - (1 - LEVEL) / pairs)
    deviation = _pooled_deviation(list(filled.values()))
    return Gap(highest, lowest, found, found.value / deviation if deviation else 0.0)


def _pooled_deviation(groups: Sequence[Sequence[float]]) -> float:
    """Returns the pooled standard deviation within groups; 0 if no group has two values."""
    degrees = sum(len(values) - 1 for values in groups)
    squares = sum(variance(values) * (len(values) - 1) for values in groups if len(values) > 1)
    return math.sqrt(squares / degrees) if degrees else 0.0


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Returns Spearman's correlation with Fisher's interval; 0 without one if a list is constant."""
    count = len(first)
    if min(len(set(first)), len(set(second))) < 2:
        return Estimate(count, 0.0)
    # Spearman's correlation is Pearson's of the ranks; only the latter has an interval in SciPy.
    found: Any = stats.pearsonr(stats.rankdata(first), stats.rankdata(second))
    if count <= FEWEST:
        return Estimate(count, float(found.statistic))
    low, high = found.confidence_interval(LEVEL)
    return Estimate(count, float(found.statistic), float(low), float(high))
