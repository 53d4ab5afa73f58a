"""The image encoder of a recipe: its autoencoder with the fingerprint of the latents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperalign.hosts.diffusers.tiny import load_tiny
from train.config import TrainConfig
from train.models.load import load_autoencoder


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """A function from images to latents, and what identifies the latents."""

    resolution: int
    """Side of the square images, in pixels."""
    fingerprint: str
    """Identifies the autoencoder and the scaling of the latents."""
    encode: Callable[[Tensor], Tensor]
    """Images (B, 3, H, W) in [0, 1] -> scaled latents on the CPU."""


def latent_fingerprint(autoencoder: nn.Module, scale: float, shift: float) -> str:
    """Returns a hash of the encoder's first weights and of the latents' scale and shift.

    The weights are rounded to bfloat16, so that optim.bf16 may change over encoded images.
    """
    first = next(autoencoder.parameters()).detach().bfloat16().float().cpu().numpy().tobytes()
    return hashlib.sha256(first + f"{scale} {shift}".encode()).hexdigest()[:16]


def image_encoder(config: TrainConfig, device: torch.device) -> ImageEncoder:
    """Returns a recipe's encoder. Raises HyperAlignError if its autoencoder is missing."""
    if config.model.base == "tiny":
        tiny = load_tiny(device)
        name = latent_fingerprint(tiny.autoencoder, tiny.latent_scale, 0.0)
        return ImageEncoder(64, name, lambda images: tiny.encode(images.to(device)).cpu())
    autoencoder = load_autoencoder(config, device, "full")
    name = latent_fingerprint(autoencoder.module, autoencoder.scale, autoencoder.shift)
    return ImageEncoder(config.model.resolution, name, lambda images: autoencoder.encode(images).cpu())
