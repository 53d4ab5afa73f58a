"""The embedded tiny model in diffusers' classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from ...tiny.text_encoder import TinyTextEncoder, tokenize_batch
from ...tiny.weights import AUTOENCODER_CONFIG, NOISE_SCHEDULE, UNET_CONFIG, load_part


def posterior(autoencoder: AutoencoderKL, images_BCHW: Tensor) -> DiagonalGaussianDistribution:
    """Returns the latent distribution of images in [-1, 1]."""
    return cast(Any, autoencoder).encode(images_BCHW).latent_dist


def decode(autoencoder: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
    """Returns images, about [-1, 1], of unscaled latents."""
    return cast(Any, autoencoder).decode(latents_BCHW).sample


@dataclass(frozen=True, slots=True)
class TinyBase:
    """The frozen base model: U-Net, autoencoder and text encoder."""

    unet: UNet2DConditionModel
    autoencoder: AutoencoderKL
    text_encoder: TinyTextEncoder
    latent_scale: float
    """Latents are multiplied by this before diffusion, so that they have unit deviation."""

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.unet.device

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Returns context (B, 16, 128). Raises HyperAlignError on unknown words."""
        return self.text_encoder(tokenize_batch(prompts).to(self.device))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Returns images (B, 3, 64, 64), about [0, 1] and not clamped; keeps the graph."""
        return decode(self.autoencoder, latents_BCHW / self.latent_scale) / 2 + 0.5

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Returns scaled latents (B, 4, 16, 16) of images (B, 3, 64, 64) in [0, 1]."""
        return posterior(self.autoencoder, images_BCHW * 2 - 1).mode() * self.latent_scale


def load_tiny(device: torch.device | str = "cpu") -> TinyBase:
    """Loads the embedded model, frozen and in float32. Raises HyperAlignError if a part is missing."""
    unet = UNet2DConditionModel(**UNET_CONFIG)
    unet.load_state_dict(load_part("unet")[0])
    autoencoder = AutoencoderKL(**AUTOENCODER_CONFIG)
    state, header = load_part("autoencoder")
    autoencoder.load_state_dict(state)
    text_encoder = TinyTextEncoder()
    text_encoder.load_state_dict(load_part("text_encoder")[0])
    nn.ModuleList([unet, autoencoder, text_encoder]).eval().requires_grad_(False).to(device)
    return TinyBase(unet, autoencoder, text_encoder, float(header["scaling_factor"]))


def tiny_scheduler() -> DDIMScheduler:
    """Returns DDIM as the model wants it: trailing timesteps, and x0-hat never clipped.

    The latents have unit deviation; diffusers' default clip to [-1, 1] would wash every colour out.
    """
    return DDIMScheduler(
        **NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
