"""How figures spread over the prompts of a list, and how sure their means are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperalign.trace import rounded

LOW, HIGH = 0.05, 0.95
"""Quantiles of a band."""
GROUPS = 10


class Band(NamedTuple):
    """Values of several prompts at several places, each field (E,)."""

    mean: Tensor
    deviation: Tensor
    """Standard deviation over the prompts."""
    low: Tensor
    """The 5 % quantile of the prompts."""
    high: Tensor
    """The 95 % quantile of the prompts."""

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON types."""
        return {name: rounded(values) for name, values in self._asdict().items()}


def band(values_EP: Tensor) -> Band:
    """Returns mean, spread and quantiles over two or more prompts P."""
    values_EP = values_EP.double()
    low_E, high_E = values_EP.quantile(torch.tensor([LOW, HIGH], dtype=torch.float64), dim=1)
    return Band(values_EP.mean(dim=1), values_EP.std(dim=1), low_E, high_E)


def standard_error(statistic: Callable[[Sequence[int]], Tensor], prompts: int) -> Tensor:
    """Returns the standard error of a statistic of a list's prompts, in its shape.

    It is the delete-a-group jackknife (Kott 2001): with g groups of prompts and theta_k the statistic without
    group k, the variance is (g - 1) / g times the sum of (theta_k - mean)^2.

    Args:
        statistic: takes the indices of some prompts.
        prompts: how many there are, 3 or more.
    """
    groups = min(GROUPS, prompts)
    without = torch.stack([
        statistic([index for index in range(prompts) if index % groups != group]) for group in range(groups)
    ]).double()  # fmt: skip
    return ((groups - 1) * without.var(dim=0, correction=0)).sqrt()
