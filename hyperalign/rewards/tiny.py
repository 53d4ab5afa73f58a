"""The embedded model's two rewards: the one its hypernetworks were trained with, and the held-out one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import HyperAlignError
from ..tiny.judges import load_heldout_reward, load_reward
from ..tiny.text_encoder import tokenize_batch
from . import Reward

PIXELS = 64
LOADERS = {"tiny reward": load_reward, "tiny held-out reward": load_heldout_reward}
NAMES = tuple(LOADERS)


@dataclass(frozen=True, slots=True)
class TinyPreference:
    """A tiny judge behind the `Reward` protocol."""

    name: str
    module: nn.Module

    @torch.no_grad()
    def score(self, images_BHWC: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns scores (B,) in float32, for pictures of any size.

        Raises HyperAlignError on unknown words, or another number of prompts than pictures.
        """
        if len(prompts) != images_BHWC.shape[0]:
            raise HyperAlignError(
                f"Found {images_BHWC.shape[0]} pictures and {len(prompts)} prompts; "
                "expected one prompt per picture."
            )
        device = next(self.module.parameters()).device
        images_BCHW = images_BHWC[..., :3].permute(0, 3, 1, 2).float().to(device)
        if images_BCHW.shape[-2:] != (PIXELS, PIXELS):
            images_BCHW = F.interpolate(images_BCHW, size=(PIXELS, PIXELS), mode="area")
        return self.module(images_BCHW, tokenize_batch(list(prompts)).to(device)).float()


def load(name: str) -> Reward:
    """Loads one of `NAMES`, frozen. Raises HyperAlignError on another name or damaged weights."""
    if name not in LOADERS:
        raise HyperAlignError(f"There is no reward {name!r}; expected one of {', '.join(NAMES)}.")
    return TinyPreference(name, LOADERS[name]())
