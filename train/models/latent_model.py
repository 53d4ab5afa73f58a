"""What the real base models share: a backbone on latents that an autoencoder makes, 8 times smaller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.models.autoencoder import Autoencoder


class LatentModel:
    """A backbone with its autoencoder; families add their call and their noise process."""

    def __init__(self, backbone: nn.Module, autoencoder: Autoencoder, resolution: int) -> None:
        self.backbone = backbone
        self.module: Any = backbone
        """The backbone, as diffusers' untyped class."""
        self.autoencoder = autoencoder
        self.latent_shape = (autoencoder.channels, resolution // 8, resolution // 8)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
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
