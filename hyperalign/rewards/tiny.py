"""The tiny model's two rewards: the one its hypernetworks were trained with, and the validation reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import HyperAlignError
from ..tiny.evaluators import TinyReward, TinyValidationReward, load_reward, load_validation_reward
from ..tiny.text_encoder import tokenize_batch
from . import Reward
from .network_reward import NetworkReward

PIXELS = 64
LOADERS = {"tiny reward": load_reward, "tiny validation reward": load_validation_reward}
NAMES = tuple(LOADERS)


@dataclass(frozen=True, slots=True)
class TinyPreference(NetworkReward[TinyReward | TinyValidationReward]):
    """A tiny reward behind the `Reward` protocol; it also refuses prompts with unknown words."""

    def _score(self, pixels_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.module(pixels_BCHW, tokenize_batch(list(prompts)).to(pixels_BCHW.device))

    def _embed(self, pixels_BCHW: Tensor) -> Tensor:
        return self.module.embed_images(pixels_BCHW)


def preprocess(images_BCHW: Tensor) -> Tensor:
    """Returns the input of the tiny rewards: 64 x 64 pixels, averaged over areas."""
    if images_BCHW.shape[-2:] == (PIXELS, PIXELS):
        return images_BCHW
    return F.interpolate(images_BCHW, size=(PIXELS, PIXELS), mode="area")


def load(name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Reward:
    """Loads one of `NAMES`, frozen. Raises HyperAlignError on another name or damaged weights."""
    if name not in LOADERS:
        raise HyperAlignError(f"There is no reward {name!r}; expected one of {', '.join(NAMES)}.")
    with torch.inference_mode(False):
        return TinyPreference(name, LOADERS[name]().to(device, dtype), preprocess)
