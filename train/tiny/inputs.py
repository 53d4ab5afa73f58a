"""What the embedded tiny model trains with: prompts of its grammar, EmojiScenes, its own reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hyperalign.tiny.evaluators import load_reward
from hyperalign.tiny.prompts import FAMILIES, WORDINGS, Family
from hyperalign.tiny.text_encoder import tokenize_batch
from train.objective import RewardFn
from train.tiny.dataset import PreferenceLatents, training_prompts


@dataclass(frozen=True, slots=True)
class GrammarPrompts:
    """Prompts of the training split, families sampled uniformly; behind the `Prompts` protocol."""

    families: Sequence[Family] = FAMILIES
    wordings: Sequence[str] = WORDINGS

    def sample(self, count: int, rng: np.random.Generator) -> list[str]:
        """Returns `count` prompts."""
        return training_prompts(count, int(rng.integers(2**31)), self.families, self.wordings)


@dataclass(frozen=True, slots=True)
class EmojiScenes:
    """Encoded EmojiScenes, sampled independently; behind the `PreferenceDataset` protocol."""

    scenes: PreferenceLatents

    def batch(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, list[str]]:
        """Returns latents (B, 4, 16, 16) and captions."""
        del position
        chosen = rng.integers(len(self.scenes.latents), size=count)[part]
        captions = [self.scenes.captions[index] for index in chosen]
        return self.scenes.latents[torch.from_numpy(chosen)], captions


@dataclass(frozen=True, slots=True)
class ScenePairs:
    """EmojiScenes, each with a rejected image; behind the `PairDataset` protocol."""

    scenes: PreferenceLatents
    rejected: Tensor

    def pairs(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Returns preferred and rejected latents (B, 4, 16, 16), and captions."""
        del position
        chosen = rng.integers(len(self.rejected), size=count)[part]
        rows = torch.from_numpy(chosen)
        captions = [self.scenes.captions[index] for index in chosen]
        return self.scenes.latents[rows], self.rejected[rows], captions


def tiny_reward(device: torch.device) -> RewardFn:
    """Returns the preference reward of images (B, 3, 64, 64), about [0, 1]; keeps the graph."""
    network = load_reward().eval().requires_grad_(False).to(device)

    def score(images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return network(images_BCHW.clamp(0.0, 1.0), tokenize_batch(list(prompts)).to(device))

    return score
