"""Stable Diffusion 1.5 and SDXL: a U-Net on 8x smaller latents, classifier-free guidance."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hyperalign.hosts.diffusers.adapter import Call, unet_call
from train.models.autoencoder import Autoencoder
from train.models.base import Conditions
from train.models.latent_model import LatentModel
from train.noise import DiffusionSchedule

CLIP_TOKENS = 77


class StableDiffusion(LatentModel):
    """SD 1.5 or SDXL behind the `Base` protocol."""

    cfg = True

    def __init__(
        self,
        unet: nn.Module,
        autoencoder: Autoencoder,
        resolution: int,
        prediction: Literal["epsilon", "v_prediction"] = "epsilon",
    ) -> None:
        super().__init__(unet, autoencoder, resolution)
        self.noise_schedule = DiffusionSchedule(prediction)

    def call(self, x_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Call:
        """Returns the U-Net's arguments; SDXL also receives the image size and a crop at the origin."""
        dtype = self.module.dtype
        call = unet_call(x_BCHW.to(dtype), t_B, conditions["prompt_embeds"].to(dtype))
        if "pooled_prompt_embeds" not in conditions:
            return call
        height, width = (8 * side for side in x_BCHW.shape[-2:])
        added = {
            "text_embeds": conditions["pooled_prompt_embeds"].to(dtype),
            "time_ids": size_ids(height, width, x_BCHW.device).to(dtype).expand(len(x_BCHW), -1),
        }
        return {**call, "added_cond_kwargs": added}


@functools.lru_cache
def size_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Returns SDXL's image size, crop and target size (1, 6). Kept, as a GPU would wait for each new copy."""
    return torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=torch.float32)


def encode_sd15(pipeline: Any, prompts: Sequence[str], length: int) -> Conditions:
    """Returns CLIP's 77 vectors of each prompt; longer prompts are cut."""
    del length
    embeds, _ = pipeline.encode_prompt(list(prompts), pipeline.device, 1, False)
    return {"prompt_embeds": embeds}


def encode_sdxl(pipeline: Any, prompts: Sequence[str], length: int) -> Conditions:
    """Returns both CLIPs' 77 vectors of each prompt, and the second one's pooled vector.

    The empty prompt, from which CFG leads away, is encoded like any other: so samples ComfyUI. diffusers
    takes zeros instead (`force_zeros_for_empty_prompt`) unless it is given `negative_prompt=""`.
    """
    del length
    embeds, _, pooled, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
