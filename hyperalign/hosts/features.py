"""Collects the features that perception reads, while a base model runs its early blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..perception import token_map
from .forwards import watched

FeatureMap = Callable[[Any], Tensor]
"""Output of a perception block -> its feature map (B, C, H, W)."""


class PerceptionDone(Exception):
    """Ends a forward after its perception blocks."""


def stop_forward(_: Sequence[Tensor]) -> None:
    """Ends the forward by PerceptionDone."""
    raise PerceptionDone


def first_output(output: Any) -> Tensor:
    """Returns the feature map of a U-Net's layer, which some return in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class ImageTokens:
    """The feature map of a transformer block: its image tokens on their grid."""

    grid: tuple[int, int]
    """Rows and columns."""
    index: int
    """Of the image tokens among the block's outputs."""

    def __call__(self, output: Any) -> Tensor:
        """Returns the image tokens as (B, C, H, W)."""
        return token_map(output[self.index], self.grid)


class _Collector:
    def __init__(
        self, levels: int, feature_map: FeatureMap, complete: Callable[[Sequence[Tensor]], None]
    ) -> None:
        self.levels, self.feature_map, self.complete = levels, feature_map, complete
        self.features: list[Tensor] = []

    def see(self, output: Any) -> None:
        self.features.append(self.feature_map(output))
        if len(self.features) == self.levels:
            self.complete(self.features)


@contextlib.contextmanager
def collecting(
    blocks: Sequence[nn.Module],
    feature_map: FeatureMap,
    complete: Callable[[Sequence[Tensor]], None],
    traced: bool = False,
) -> Iterator[list[Tensor]]:
    """Yields a list that a forward fills with one feature map per level; then `complete` receives it.

    Args:
        blocks: the module of each level whose output is the feature, in forward order.
        feature_map: makes a map (B, C, H, W) of an output.
        complete: is called in the middle of the forward, once all levels are there.
        traced: as for `watched`.
    """
    collector = _Collector(len(blocks), feature_map, complete)
    with contextlib.ExitStack() as watches:
        for block in blocks:
            watches.enter_context(watched(block, collector.see, traced))
        yield collector.features
