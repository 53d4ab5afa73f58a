"""Selection of images by their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from .errors import HyperAlignError

SelectionMode = Literal["top-k", "threshold", "sort"]


def select(
    scores: Sequence[float], mode: SelectionMode, k: int = 1, threshold: float = 0.0
) -> tuple[list[int], list[int]]:
    """Returns the indices of the chosen and of the rejected, both best first, ties in their order.

    Args:
        scores: one per image; greater is better.
        mode: `top-k` keeps the k best, `threshold` those of at least the threshold, `sort` all.
        k: how many `top-k` keeps, at most.
        threshold: the least score that `threshold` keeps.

    Raises:
        HyperAlignError: no score, one that is not finite, or k below 1.
    """
    if not scores or not all(math.isfinite(score) for score in scores):
        raise HyperAlignError(
            f"Found the scores {list(scores)}; expected at least one, and numbers only. Connect Reward Score."
        )
    if k < 1:
        raise HyperAlignError(f"k is {k}; expected at least 1. Use 1 for the best alone.")
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    if mode == "sort":
        return order, []
    count = k if mode == "top-k" else sum(score >= threshold for score in scores)
    return order[:count], order[count:]
