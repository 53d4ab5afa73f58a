"""Stable Diffusion 3.5 medium: flow matching with a fixed shift, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hyperalign.hosts.diffusers.adapter import Call
from train.models.autoencoder import Autoencoder
from train.models.base import Conditions
from train.models.latent_model import LatentModel
from train.noise import FlowSchedule

SHIFT = 3.0


class StableDiffusion3(LatentModel):
    """SD 3.5 medium behind the `Base` protocol."""

    cfg = True

    def __init__(self, transformer: nn.Module, autoencoder: Autoencoder, resolution: int) -> None:
        super().__init__(transformer, autoencoder, resolution)
        self.noise_schedule = FlowSchedule(1000.0, SHIFT)

    def call(self, x_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Call:
        """Returns the transformer's arguments."""
        dtype = self.module.dtype
        return {
            "hidden_states": x_BCHW.to(dtype),
            "timestep": t_B,
            "encoder_hidden_states": conditions["prompt_embeds"].to(dtype),
            "pooled_projections": conditions["pooled_prompt_embeds"].to(dtype),
        }


def encode_sd3(pipeline: Any, prompts: Sequence[str], length: int) -> Conditions:
    """Returns the vectors of CLIP and T5 of each prompt, T5's padded to `length`, and the pooled ones."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
