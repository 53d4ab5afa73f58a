"""The embedded model's two rewards: the one its hypernetworks were trained with, and the validation one."""

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
from .images import check_images, network_pixels
from .networks import own_precision
from .text import check_prompts

PIXELS = 64
LOADERS = {"tiny reward": load_reward, "tiny validation reward": load_validation_reward}
NAMES = tuple(LOADERS)


@dataclass(frozen=True, slots=True)
class TinyPreference:
    """A tiny judge behind the `Reward` protocol."""

    name: str
    module: TinyReward | TinyValidationReward

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns one score (B,) per image, as `Reward.score`; it also refuses unknown words."""
        check_images(images_BCHW)
        check_prompts(prompts, images_BCHW.shape[0])
        with own_precision(self.module):
            pixels_BCHW = network_pixels(images_BCHW, self.module, prepare)
            tokens_BL = tokenize_batch(list(prompts)).to(pixels_BCHW.device)
            return self.module(pixels_BCHW, tokens_BL)

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Returns unit embeddings (B, 128), as `Reward.embed_images`."""
        check_images(images_BCHW)
        with own_precision(self.module):
            return self.module.embed_images(network_pixels(images_BCHW, self.module, prepare))


def prepare(images_BCHW: Tensor) -> Tensor:
    """Returns what the tiny judges read: 64 x 64, averaged over areas."""
    if images_BCHW.shape[-2:] == (PIXELS, PIXELS):
        return images_BCHW
    return F.interpolate(images_BCHW, size=(PIXELS, PIXELS), mode="area")


def load(name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Reward:
    """Loads one of `NAMES`, frozen. Raises HyperAlignError on another name or damaged weights."""
    if name not in LOADERS:
        raise HyperAlignError(f"There is no reward {name!r}; expected one of {', '.join(NAMES)}.")
    with torch.inference_mode(False):
        return TinyPreference(name, LOADERS[name]().to(device, dtype))
