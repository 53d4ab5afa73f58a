"""Win rates and how far to trust them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import NamedTuple

Z_95 = 1.959963984540054
RESAMPLES = 4000


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def of_votes(points: Mapping[str, Sequence[float]], seed: int = 0) -> Interval:
    """Returns the interval of a win rate.

    It is Wilson's where every prompt has one vote, and otherwise the bootstrap's over prompts, which knows
    that votes on one prompt go together. With few prompts the bootstrap sees too little of their spread, so
    it counts only where it is the wider of the two.

    Args:
        points: by prompt, what one side won in each vote: 1, 0.5 for a tie, or 0.
        seed: of the bootstrap's draws.
    """
    votes = [won for prompt in points.values() for won in prompt]
    alone = wilson(sum(votes), len(votes))
    if len(votes) == len(points):
        return alone
    together = bootstrap(points, seed)
    return Interval(min(alone.low, together.low), max(alone.high, together.high))


def wilson(points: float, count: int, z: float = Z_95) -> Interval:
    """Returns Wilson's score interval of a share (Wilson 1927, eq. 4.2 in Brown, Cai and DasGupta 2001).

    Args:
        points: wins; a tie is half of one.
        count: comparisons, at least 1.
        z: quantile of the normal distribution.
    """
    share = points / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def bootstrap(points: Mapping[str, Sequence[float]], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Returns the percentile bootstrap interval of the mean, with prompts drawn anew and their votes kept.

    Raters who look at the same images agree more than chance: counting their votes as independent would
    make the interval too narrow, drawing whole prompts does not. Where the prompts' means are all alike the
    bootstrap sees no spread, and the answer is Wilson's for as many votes as there are prompts.

    Args:
        points: by prompt, what one side won in each vote: 1, 0.5 for a tie, or 0.
        seed: of the draws.
        resamples: how many draws.
    """
    sums = [(sum(votes), len(votes)) for votes in points.values()]
    mean = sum(won for won, _ in sums) / sum(count for _, count in sums)
    if len({won / count for won, count in sums}) == 1:
        return wilson(mean * len(sums), len(sums))
    generator = random.Random(seed)
    means: list[float] = []
    for _ in range(resamples):
        drawn = generator.choices(sums, k=len(sums))
        means.append(sum(won for won, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    edge = round(0.025 * (resamples - 1))
    return Interval(means[edge], means[-1 - edge])
