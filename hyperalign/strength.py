"""Strength over a run: a curve over the noise range, and a factor for each group of blocks.

Because y = W x + s B_aux (K (A_aux x)), a strength for each adapted layer is a factor on its core K.

Percents are ComfyUI's: a fraction of the model's noise range, 0 pure noise and 1 the finished image, for
SD-type models 1 - u. They say the same whatever the sampler, scheduler, number of steps or denoise, and for
evaluations between two steps. With the scheduler `normal`, the n-th of N steps lies at (n - 1) / (N - 1).
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import HyperAlignError

PercentToSigma = Callable[[float], float]
"""A model's noise level at a percent, as the host's `model_sampling` gives it."""
Ease = Literal["linear", "ease_in", "ease_out", "ease_in_out"]
EASES: tuple[Ease, ...] = get_args(Ease)
GROUPS = ("early", "middle", "late")
"""The groups of blocks, in forward order."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of consecutive blocks of one stack, as fractions of the stack."""

    stack: str
    """What diffusers' path of the blocks starts with."""
    start: float = 0.0
    end: float = 1.0


UNET_PARTS = (Part("down_blocks"), Part("mid_block"), Part("up_blocks"))
TRANSFORMER_PARTS = {
    "flux": (
        Part("transformer_blocks", 0.0, 1 / 2),
        Part("transformer_blocks", 1 / 2, 1.0),
        Part("single_transformer_blocks"),
    ),
    "sd3": (
        Part("transformer_blocks", 0.0, 1 / 3),
        Part("transformer_blocks", 1 / 3, 2 / 3),
        Part("transformer_blocks", 2 / 3, 1.0),
    ),
}
"""What the groups are in transformers, by family; every other family is a U-Net."""


@dataclass(frozen=True, slots=True)
class StrengthCurve:
    """Factors on the strength, over the run and by group of blocks."""

    values: tuple[float, ...] = (1.0,)
    """Factors spread evenly from start_percent to end_percent, with straight lines between them."""
    ease: Ease = "linear"
    """How the way from the first value to the last is travelled."""
    start_percent: float = 0.0
    end_percent: float = 1.0
    groups: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Further factors on the early, middle and late blocks."""

    def __post_init__(self) -> None:
        """Checks the numbers. Raises HyperAlignError."""
        if not self.values:
            raise HyperAlignError(
                "The strength curve's list has 0 values; expected at least 1 number, such as 1, 0.5, 0."
            )
        for name, numbers in (("value", self.values), ("block strength", self.groups)):
            for place, number in enumerate(numbers, start=1):
                if not math.isfinite(number):
                    raise HyperAlignError(
                        f"The strength curve's {name} {place} is {number}; expected a number, "
                        "0 for off and 1 as trained."
                    )
        if self.ease not in EASES:
            raise HyperAlignError(f"The ease is {self.ease!r}; expected one of {', '.join(EASES)}.")
        if not 0.0 <= self.start_percent < self.end_percent <= 1.0:
            raise HyperAlignError(
                f"The strength curve's start_percent is {self.start_percent} and end_percent is "
                f"{self.end_percent}; expected 0 <= start_percent < end_percent <= 1. Use 0 and 1 for the "
                "whole run."
            )

    @property
    def window(self) -> tuple[float, float]:
        """From where to where it acts, in percents."""
        return self.start_percent, self.end_percent

    def at(self, percent: float) -> float:
        """Returns the factor at a percent inside the window, and the nearest end's outside it."""
        way = (percent - self.start_percent) / (self.end_percent - self.start_percent)
        return interpolate(self.values, eased(min(max(way, 0.0), 1.0), self.ease))


class TargetStrengths:
    """A curve at work on the M targets of one hypernetwork."""

    def __init__(self, curve: StrengthCurve, family: str, names: Sequence[str]) -> None:
        self._curve = curve
        self._groups_M = torch.tensor([curve.groups[group] for group in groups_of(family, names)])
        self._noise_range: NoiseRange | None = None

    def at(self, sigma: float, percent_to_sigma: PercentToSigma) -> Tensor:
        """Returns the factor (M,) on each target's strength at a noise level of a model."""
        # The model's noise range may have been changed since the last call.
        if self._noise_range is None or not self._noise_range.is_of(percent_to_sigma):
            self._noise_range = NoiseRange.of(percent_to_sigma)
        return self._curve.at(self._noise_range.percent(sigma)) * self._groups_M


def overlap(window: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Returns the percents that lie in both windows. Raises HyperAlignError if there are none."""
    start, end = max(window[0], other[0]), min(window[1], other[1])
    if start >= end:
        raise HyperAlignError(
            f"The strength curve acts from {other[0]} to {other[1]} of the run, but HyperAlign itself from "
            f"{window[0]} to {window[1]}: never at once. Leave the latter at 0 and 1."
        )
    return start, end


def eased(way: float, ease: Ease) -> float:
    """Returns the eased way in [0, 1]: rising, exact at 0 and 1, and as ComfyUI's hook keyframes ease."""
    if ease == "ease_in":
        return way**2
    if ease == "ease_out":
        return 1.0 - (1.0 - way) ** 2
    if ease == "ease_in_out":
        return (1.0 - math.cos(math.pi * way)) / 2.0
    return way


def interpolate(values: Sequence[float], way: float) -> float:
    """Returns the piecewise linear curve through evenly spread values at a way in [0, 1]."""
    place = way * (len(values) - 1)
    index = int(place)
    if index >= len(values) - 1:
        return values[-1]
    return values[index] + (place - index) * (values[index + 1] - values[index])


def parse_values(text: str) -> tuple[float, ...]:
    """Returns the numbers of a text, between commas, semicolons or white space. Raises HyperAlignError."""
    words = [word for word in re.split(r"[\s,;]+", text) if word]
    try:
        return tuple(float(word) for word in words)
    except ValueError as error:
        raise HyperAlignError(
            f"The list of values is {text!r}; expected numbers with commas between, such as 1, 0.5, 0."
        ) from error


def groups_of(family: str, names: Sequence[str]) -> list[int]:
    """Returns the index in GROUPS of each target, by its diffusers name. Raises HyperAlignError."""
    parts = TRANSFORMER_PARTS.get(family, UNET_PARTS)
    places = [_stack_and_block(name) for name in names]
    # The last block of each stack is adapted in both perception modes, so it gives the stack's length.
    lengths: dict[str, int] = {}
    for stack, block in places:
        lengths[stack] = max(lengths.get(stack, 0), block + 1)
    return [_group(parts, stack, block / lengths[stack]) for stack, block in places]


def scaled(cores_BMDA: Tensor, strengths_M: Tensor) -> Tensor:
    """Returns the cores with each target's multiplied by its strength."""
    return cores_BMDA * strengths_M.to(cores_BMDA)[:, None, None]


@dataclass(frozen=True, slots=True)
class NoiseRange:
    """The inverse of a model's percent_to_sigma: its ends, and straight lines between 129 points."""

    sigmas: tuple[float, ...]
    """Rising."""
    percents: tuple[float, ...]
    """The percent of each, falling."""

    @classmethod
    def of(cls, percent_to_sigma: PercentToSigma) -> NoiseRange:
        """Tabulates a model's percent_to_sigma."""
        percents = tuple(1 - i / 128 for i in range(129))
        # For 0 and 1 themselves the host answers sigmas outside the range, to say "all of it".
        inside = [min(max(percent, 1e-6), 1 - 1e-6) for percent in percents]
        return cls(tuple(float(percent_to_sigma(percent)) for percent in inside), percents)

    def is_of(self, percent_to_sigma: PercentToSigma) -> bool:
        """Returns whether a model has this noise range, by comparing its middle."""
        return float(percent_to_sigma(0.5)) == self.sigmas[64]

    def percent(self, sigma: float) -> float:
        """Returns the percent of a sigma; the nearest end's outside the range."""
        if sigma <= self.sigmas[0]:
            return 1.0
        if sigma >= self.sigmas[-1]:
            return 0.0
        above = bisect.bisect_left(self.sigmas, sigma)
        low, high = self.sigmas[above - 1 : above + 1]
        return interpolate(self.percents[above - 1 : above + 1], (sigma - low) / (high - low))


def _stack_and_block(name: str) -> tuple[str, int]:
    """Returns (`up_blocks`, 1) of `up_blocks.1.attentions.0...`; the only middle block is block 0."""
    stack, _, rest = name.partition(".")
    head = rest.partition(".")[0]
    return stack, int(head) if head.isdecimal() else 0


def _group(parts: Sequence[Part], stack: str, place: float) -> int:
    for index, part in enumerate(parts):
        if stack == part.stack and part.start <= place < part.end:
            return index
    raise HyperAlignError(
        f"The layers of {stack} belong to no group of blocks; expected one of "
        f"{', '.join(sorted({part.stack for part in parts}))}. Update HyperAlign."
    )
