"""Means, gaps and correlations with their confidence intervals, from lists of numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist, fmean, stdev, variance

LEVEL = 0.95
FEWEST = 3
"""Fewer numbers have no interval."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval; without one, there were too few numbers."""

    count: int
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


@dataclass(frozen=True, slots=True)
class Gap:
    """How far the highest group lies above the lowest."""

    highest: str
    lowest: str
    size: Estimate
    """Its interval holds for all pairs of groups at once (Bonferroni)."""
    spreads: float
    """In standard deviations of the scores within groups, so that rewards can be compared."""


def t_quantile(chance: float, degrees: float) -> float:
    """Returns Student's t below which a share `chance` lies (Abramowitz and Stegun 26.7.5), degrees >= 2."""
    z = NormalDist().inv_cdf(chance)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def mean(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Returns the mean with Student's interval."""
    if len(values) < FEWEST:
        return Estimate(len(values), fmean(values))
    half = t_quantile((1 + level) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(len(values), fmean(values), fmean(values) - half, fmean(values) + half)


def difference(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Estimate:
    """Returns mean(first) - mean(second) of different images with Welch's interval."""
    value, count = fmean(first) - fmean(second), min(len(first), len(second))
    if count < FEWEST:
        return Estimate(count, value)
    parts = [variance(values) / len(values) for values in (first, second)]
    total = sum(parts)
    if total == 0.0:
        return Estimate(count, value, value, value)
    # Welch and Satterthwaite's formula in shares: squares of small variances would vanish.
    shares = [part / total for part in parts]
    degrees = 1 / sum(
        share**2 / (len(values) - 1) for share, values in zip(shares, (first, second), strict=True)
    )
    half = t_quantile((1 + level) / 2, degrees) * math.sqrt(total)
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
    size = compare(filled[highest], filled[lowest], 1 - (1 - LEVEL) / pairs)
    spread = _spread(list(filled.values()))
    return Gap(highest, lowest, size, size.value / spread if spread else 0.0)


def _spread(groups: Sequence[Sequence[float]]) -> float:
    """Returns the pooled standard deviation within groups; 0 where it cannot be known."""
    degrees = sum(len(values) - 1 for values in groups)
    squares = sum(variance(values) * (len(values) - 1) for values in groups if len(values) > 1)
    return math.sqrt(squares / degrees) if degrees else 0.0


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Returns Spearman's correlation with Fisher's interval; 0 where one of them is constant."""
    ranks = [_ranks(values) for values in (first, second)]
    means = [fmean(rank) for rank in ranks]
    a, b = ([value - middle for value in rank] for rank, middle in zip(ranks, means, strict=True))
    scale = math.sqrt(sum(value * value for value in a) * sum(value * value for value in b))
    value = sum(x * y for x, y in zip(a, b, strict=True)) / scale if scale else 0.0
    count = len(first)
    if count <= FEWEST or not scale:
        return Estimate(count, value)
    centre = math.atanh(max(-0.999999, min(0.999999, value)))
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) / math.sqrt(count - 3)
    return Estimate(count, value, math.tanh(centre - half), math.tanh(centre + half))


def _ranks(values: Sequence[float]) -> list[float]:
    """Returns places from 0; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    first = 0
    while first < len(order):
        last = first
        while last + 1 < len(order) and values[order[last + 1]] == values[order[first]]:
            last += 1
        for place in range(first, last + 1):
            ranks[order[place]] = (first + last) / 2
        first = last + 1
    return ranks
