"""The host's own sampling, called as by its KSampler node, after our own checks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import HyperAlignError

SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS
DOWNSCALE_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
"""Entries of a newer host's empty LATENT: for how many pixels or frames per latent it was made."""
_FIXED_BY = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters


def check_steps(steps: int) -> None:
    """Raises HyperAlignError unless there is at least one step."""
    if steps < 1:
        raise HyperAlignError(f"steps is {steps}; expected at least 1. Typical values are 20 to 30.")


def start_of(model: ModelPatcher, latent: Mapping[str, Any]) -> Tensor:
    """Returns the samples that the host's KSampler starts from: an empty LATENT gets the model's size."""
    ratios = {name: latent.get(name) for name in DOWNSCALE_RATIOS if name in _FIXED_BY}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


def sampled(latent: Mapping[str, Any], samples: Tensor) -> dict[str, Any]:
    """Returns a LATENT with new samples, which are no longer empty ones of another model's size."""
    kept = {name: value for name, value in latent.items() if name not in DOWNSCALE_RATIOS}
    return {**kept, "samples": samples}


def ksample(
    model: ModelPatcher,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    denoise: float,
) -> dict[str, Any]:
    """Returns the LATENT of the host's KSampler, with its progress bar and preview.

    Raises HyperAlignError if steps is below 1.
    """
    check_steps(steps)
    start = start_of(model, latent)
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    samples = comfy.sample.sample(
        model, noise, steps, cfg, sampler_name, scheduler, positive, negative, start,
        denoise=denoise, noise_mask=latent.get("noise_mask"), seed=seed,
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
    )  # fmt: skip
    return sampled(latent, samples)
