"""The common part of the full-size base models: a backbone on the 8x smaller latents of an autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.models.autoencoder import Autoencoder


class LatentModel:
    """A backbone with its autoencoder; families add their call and their noise schedule."""

    def __init__(self, backbone: nn.Module, autoencoder: Autoencoder, resolution: int) -> None:
        self.backbone = backbone
        self.module: Any = backbone
        """The backbone, as diffusers' untyped class."""
        self.autoencoder = autoencoder
        self.latent_shape = (autoencoder.channels, resolution // 8, resolution // 8)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.module.device

    def prediction(self, output: Tensor, x_BCHW: Tensor) -> Tensor:
        """Returns the backbone's output in float32."""
        del x_BCHW
        return output.float()

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Returns images, about [0, 1]."""
        return self.autoencoder.decode(latents_BCHW)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Returns scaled latents."""
        return self.autoencoder.encode(images_BCHW)
