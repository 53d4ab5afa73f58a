"""Rewards: judges of how well pictures fit their prompts, one file per reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn


class Reward(Protocol):
    """What a reward offers to training, evaluation and nodes."""

    @property
    def name(self) -> str:
        """A short name for tables and logs."""
        ...

    @property
    def module(self) -> nn.Module:
        """The network, so that a host can move it between devices."""
        ...

    def score(self, images_BHWC: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score (B,) per picture with values in [0, 1]; greater is better.

        Raises:
            HyperAlignError: numbers of pictures and prompts differ, or a prompt cannot be read.
        """
        ...
