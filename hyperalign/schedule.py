"""When weights are generated anew: every evaluation (S), at key times (P) or once (I).

Times are normalised: u = 1 is pure noise, u = 0 the finished image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import HyperAlignError, shown
from .finite import is_finite

Variant = Literal["S", "P", "I"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A variant with the key times of P, as fractions of the full noise range, descending."""

    variant: Variant
    key_times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Checks variant and key times. Raises HyperAlignError."""
        if self.variant not in VARIANTS:
            raise HyperAlignError(
                f"The schedule's variant is {shown(self.variant)}; expected one of {', '.join(VARIANTS)}."
            )
        times = self.key_times
        inside = all(is_finite(t) and 0.0 < t < 1.0 for t in times)
        if not inside or any(later >= earlier for earlier, later in pairwise(times)):
            raise HyperAlignError(
                f"Key times are {shown(list(times))}; expected falling numbers strictly between 1 and 0."
            )
        if self.variant == "P" and not times:
            raise HyperAlignError(
                "Variant P needs key times and the hypernetwork stores none; choose S or I, "
                "or find key times with `python train/keytimes.py`."
            )

    def segment(self, u: float) -> int:
        """Returns how many key times lie at or above u; always 0 for S and I.

        Segments partition [0, 1]: weights generated in a segment serve until u falls out of it.
        """
        return sum(u <= key for key in self.key_times) if self.variant == "P" else 0

    @property
    def last_segment(self) -> int:
        """The segment of u = 0; weights that are generated in it serve until the end."""
        return len(self.key_times) if self.variant == "P" else 0

    def is_due(self, u: float, generated_in: int | None) -> bool:
        """Returns whether an evaluation at u needs new weights.

        `generated_in` is the segment of the current weights, None when there are none.
        """
        return self.variant == "S" or generated_in is None or self.segment(u) > generated_in

    def generation_time(self, u: float) -> float:
        """Returns the time at which the weights used at u were written, in an ideal run from u = 1."""
        if self.variant == "S":
            return u
        above = [key for key in self.key_times if key >= u] if self.variant == "P" else []
        return min(above, default=1.0)


def relative_distance(x0_BCHW: Tensor, previous_x0_BCHW: Tensor, eps: float = 1e-5) -> Tensor:
    """Returns the relative distance (B,) of successive one-step predictions (the paper's Fig 4).

    Both are normalised per channel over space first, as in DyMO by the same authors.
    """

    def normalise(x: Tensor) -> Tensor:
        return (x - x.mean(dim=(2, 3), keepdim=True)) / (x.std(dim=(2, 3), keepdim=True) + eps)

    now, before = normalise(x0_BCHW).flatten(1), normalise(previous_x0_BCHW).flatten(1)
    return (now - before).norm(dim=1) / before.norm(dim=1)


def curvature(values_N: Tensor) -> Tensor:
    """Returns the curvature |d''| / (1 + d'^2)^(3/2) of a curve at its N points; 0 at both ends."""
    first = (values_N[2:] - values_N[:-2]) / 2
    second = values_N[2:] - 2 * values_N[1:-1] + values_N[:-2]
    bend = second.abs() / (1 + first.square()).pow(1.5)
    return torch.cat([bend.new_zeros(1), bend, bend.new_zeros(1)])


def find_key_times(
    distances_N: Sequence[float], times_N: Sequence[float], count: int, min_gap: int = 2
) -> tuple[float, ...]:
    """Returns the `count` times of greatest curvature of the log distance, at least `min_gap` apart.

    Args:
        distances_N: mean relative distance of each evaluation's x0-hat to the one before it.
        times_N: u of those evaluations, falling.
        count: how many key times to pick.
        min_gap: least number of evaluations between two key times, and from the start.

    Raises:
        HyperAlignError: lengths differ or the curve is too short.
    """
    if len(distances_N) != len(times_N) or len(times_N) < 3:
        raise HyperAlignError(
            f"Found {len(distances_N)} distances and {len(times_N)} times; "
            "expected the same number, at least 3."
        )
    bend = curvature(torch.tensor(distances_N, dtype=torch.float64).clamp(min=1e-12).log())
    picked: list[int] = []
    for index in bend.argsort(descending=True).tolist():
        far = all(abs(index - other) >= min_gap for other in picked)
        if far and index >= min_gap and 0.0 < times_N[index] < 1.0:
            picked.append(index)
        if len(picked) == count:
            break
    return tuple(sorted((float(times_N[i]) for i in picked), reverse=True))
