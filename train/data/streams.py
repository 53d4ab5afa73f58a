"""Streams of prompts, preference images and pairs, from which the losses take their batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from train.data.shards import LatentShards


class Prompts(Protocol):
    """The prompts of the reward loss."""

    def sample(self, count: int, rng: np.random.Generator) -> list[str]:
        """Returns `count` prompts, decided by `rng` alone."""
        ...


class PreferenceDataset(Protocol):
    """The images of the preference loss, as a stream of batches."""

    def batch(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, list[str]]:
        """Returns part of a batch: latents (B, C, H, W) and captions.

        The batch holds `count` images of one shape, at this position of the stream; `part` is what is read
        of it.
        """
        ...


class PairDataset(Protocol):
    """Pairs of a preferred and a rejected image of one prompt, as a stream of batches."""

    def pairs(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Returns part of a batch: preferred and rejected latents (B, C, H, W), and captions."""
        ...


@dataclass(frozen=True, slots=True)
class PromptList:
    """Samples from a list, without repetition where it is long enough."""

    prompts: list[str]

    def sample(self, count: int, rng: np.random.Generator) -> list[str]:
        """Returns `count` prompts."""
        chosen = rng.choice(len(self.prompts), count, replace=count > len(self.prompts))
        return [self.prompts[index] for index in chosen.tolist()]


@dataclass(frozen=True, slots=True)
class PreferenceShards:
    """Latent shards as a stream whose order the run's seed decides; pairs too, where they hold pairs."""

    shards: LatentShards
    seed: int

    def batch(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, list[str]]:
        """Returns latents (B, C, H, W) in float32, and captions."""
        del rng
        latents, captions = self.shards.read(self.shards.batch(position, count, self.seed)[part])
        return latents.float(), captions

    def pairs(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Returns preferred and rejected latents (B, C, H, W) in float32, and captions."""
        del rng
        chosen = self.shards.batch(position, count, self.seed)[part]
        latents, rejected, captions = self.shards.read_pairs(chosen)
        return latents.float(), rejected.float(), captions
