"""Random prompts' conditions and preference images of true shape, for runs without any file."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.models.base import Conditions

PROMPTS = tuple(f"a picture of {things}" for things in ("a dog", "an apple", "two cats", "three red hearts"))
TEXT_WIDTHS = {"sd15": (768, 0), "sdxl": (2048, 1280), "flux": (4096, 768), "sd3": (4096, 2048)}
"""Widths of the text encoders' vectors and of the pooled vector."""


@dataclass(frozen=True, slots=True)
class RandomPromptEncoder:
    """Random conditions of the true shape, equal for equal prompts, behind the `PromptEncoder` protocol."""

    width: int
    pooled: int
    lengths: tuple[int, ...]
    device: torch.device

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Returns random vectors, decided by the prompts."""
        length = self.lengths[zlib.crc32("\n".join(prompts).encode()) % len(self.lengths)]
        embeds = {
            "prompt_embeds": torch.stack([self._vectors(prompt, length, self.width) for prompt in prompts])
        }
        if self.pooled:
            pooled = torch.cat([self._vectors(prompt, 1, self.pooled) for prompt in prompts])
            embeds["pooled_prompt_embeds"] = pooled
        return {name: value.to(self.device) for name, value in embeds.items()}

    def _vectors(self, prompt: str, length: int, width: int) -> Tensor:
        return torch.randn(
            length, width, generator=torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        )


@dataclass(frozen=True, slots=True)
class RandomImages:
    """Random latents with captions, behind the `PreferenceDataset` and `PairDataset` protocols."""

    shape: tuple[int, int, int]

    def batch(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, list[str]]:
        """Returns latents (B, C, H, W) and captions."""
        del position
        latents = torch.from_numpy(rng.standard_normal((count, *self.shape), dtype=np.float32))
        return latents[part], [PROMPTS[index % len(PROMPTS)] for index in range(count)[part]]

    def pairs(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Returns preferred and rejected latents (B, C, H, W), and captions."""
        preferred, captions = self.batch(position, count, rng, part)
        rejected, _ = self.batch(position, count, rng, part)
        return preferred, rejected, captions
