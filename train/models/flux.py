"""FLUX.1 dev and schnell: flow matching on packed latents; dev takes the guidance as an input."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyperalign.hosts.diffusers.adapter import Call
from train.models.autoencoder import Autoencoder
from train.models.base import Conditions
from train.models.latent_model import LatentModel
from train.noise import FlowSchedule, resolution_shift

PATCH = 2


def pack(x_BCHW: Tensor) -> Tensor:
    """Returns tokens (B, H/2 * W/2, 4 C): each is a square of 2 x 2 latent cells."""
    squares = x_BCHW.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # B C h 2 w 2
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens_BLC: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns latents (B, C, H, W) of shape (H, W) from tokens: the inverse of `pack`."""
    height, width = (side // PATCH for side in shape)
    squares = tokens_BLC.unflatten(1, (height, width)).unflatten(3, (-1, PATCH, PATCH))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@functools.lru_cache
def position_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Returns the position of each token, (H/2 * W/2, 3): zero, row and column. Kept, as SDXL's sizes are."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float().to(device)


class Flux(LatentModel):
    """FLUX.1 behind the `Base` protocol."""

    cfg = False

    def __init__(self, transformer: nn.Module, autoencoder: Autoencoder, resolution: int) -> None:
        super().__init__(transformer, autoencoder, resolution)
        self.takes_guidance = bool(self.module.config.guidance_embeds)
        tokens = (resolution // 8 // PATCH) ** 2
        # schnell was distilled without a shift.
        self.noise_schedule = FlowSchedule(1.0, resolution_shift(tokens) if self.takes_guidance else 1.0)

    def call(self, x_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Call:
        """Returns the transformer's arguments."""
        dtype, device = self.module.dtype, x_BCHW.device
        context = conditions["prompt_embeds"].to(dtype)
        return {
            "hidden_states": pack(x_BCHW).to(dtype),
            "timestep": t_B,
            "guidance": conditions["guidance"] if self.takes_guidance else None,
            "pooled_projections": conditions["pooled_prompt_embeds"].to(dtype),
            "encoder_hidden_states": context,
            "txt_ids": torch.zeros(context.shape[1], 3, device=device),
            "img_ids": position_ids(x_BCHW.shape[-2], x_BCHW.shape[-1], device),
        }

    def prediction(self, output: Tensor, x_BCHW: Tensor) -> Tensor:
        """Returns the velocity (B, C, H, W) in float32."""
        height, width = x_BCHW.shape[-2:]
        return unpack(output, (height, width)).float()


def encode_flux(pipeline: Any, prompts: Sequence[str], length: int) -> Conditions:
    """Returns T5's vectors of each prompt, padded to `length`, and CLIP's pooled vector."""
    embeds, pooled, _ = pipeline.encode_prompt(list(prompts), None, max_sequence_length=length)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
