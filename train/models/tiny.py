"""The embedded tiny model behind the `Base` protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperalign.hosts.diffusers.adapter import Call, unet_call
from hyperalign.hosts.diffusers.tiny import TinyBase
from train.models.base import Conditions
from train.noise import DiffusionSchedule


class Tiny:
    """The embedded model behind the `Base` and `PromptEncoder` protocols."""

    cfg = True
    latent_shape = (4, 16, 16)

    def __init__(self, model: TinyBase) -> None:
        self.model = model
        self.backbone = model.unet
        self.noise_schedule = DiffusionSchedule()

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def call(self, x_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Call:
        """Returns the U-Net's arguments."""
        return unet_call(x_BCHW, t_B, conditions["context"])

    def prediction(self, output: Tensor, x_BCHW: Tensor) -> Tensor:
        """Returns eps in float32."""
        del x_BCHW
        return output.float()

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Returns images (B, 3, 64, 64)."""
        return self.model.decode(latents_BCHW)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Returns scaled latents (B, 4, 16, 16)."""
        return self.model.encode(images_BCHW)

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Returns the prompts' context (B, 16, 128). Raises HyperAlignError on unknown words."""
        return {"context": self.model.encode_prompts(list(prompts))}
