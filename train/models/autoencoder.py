"""Images to latents and back: the autoencoder of the base model, or TAESD as its decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Autoencoder:
    """An AutoencoderKL or AutoencoderTiny of diffusers with its scale and shift."""

    def __init__(self, module: nn.Module, checkpointing: bool = False) -> None:
        self.module: Any = module
        config = self.module.config
        self.scale = float(config.scaling_factor)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.channels = int(config.latent_channels)
        if checkpointing:
            self.module.enable_gradient_checkpointing()

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Returns images (B, 3, 8 H, 8 W), about [0, 1] and not clamped, in float32; keeps the graph."""
        latents_BCHW = (latents_BCHW / self.scale + self.shift).to(self.module.dtype)
        return self.module.decode(latents_BCHW).sample.float() / 2 + 0.5

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Returns scaled latents of images in [0, 1], in float32: the mode of their distribution."""
        images_BCHW = images_BCHW.to(self.module.device, self.module.dtype) * 2 - 1
        latents_BCHW = self.module.encode(images_BCHW).latent_dist.mode()
        return (latents_BCHW.float() - self.shift) * self.scale
