"""What a run is made of: base model, conditions, prompts, preference images, rewards and judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from hyperalign.checkpoint import HyperAlign
from train.data.shards import LatentShards
from train.models.base import Base, PromptEncoder
from train.objective import Rewards
from train.runtime import Row

Evaluate = Callable[[HyperAlign, Path], Row]
"""Samples validation prompts, writes a captioned grid to the path and returns the metrics.

Every process calls it; only the main one's metrics count."""


class Prompts(Protocol):
    """Where the prompts of the reward loss come from."""

    def draw(self, count: int, rng: np.random.Generator) -> list[str]:
        """Returns `count` prompts, decided by `rng` alone."""
        ...


class Preferred(Protocol):
    """Where the images of the preference loss come from."""

    def batch(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, list[str]]:
        """Returns part of a batch: latents (B, C, H, W) and captions.

        The batch holds `count` images at this position of the stream; `part` is what is read of it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Materials:
    """Everything a trainer works with; `preferred` is None where L_G and noised states are off."""

    base: Base
    texts: PromptEncoder
    prompts: Prompts
    preferred: Preferred | None
    rewards: Rewards
    evaluate: Evaluate
    origin: Mapping[str, str]
    """Reward, preference dataset and their licences, for the hypernetwork's header."""


@dataclass(frozen=True, slots=True)
class PromptList:
    """Draws from a list, without repetition where it is long enough."""

    prompts: list[str]

    def draw(self, count: int, rng: np.random.Generator) -> list[str]:
        """Returns `count` prompts."""
        chosen = rng.choice(len(self.prompts), count, replace=count > len(self.prompts))
        return [self.prompts[index] for index in chosen.tolist()]


@dataclass(frozen=True, slots=True)
class ShardImages:
    """Latent shards as a stream whose order the run's seed decides."""

    shards: LatentShards
    seed: int

    def batch(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, list[str]]:
        """Returns latents (B, C, H, W) in float32, and captions."""
        del rng
        latents, captions = self.shards.read(self.shards.batch(position, count, self.seed)[part])
        return latents.float(), captions
