"""The host's own sampling, called as by its KSampler node, after our own checks."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher

from ...errors import HyperAlignError

SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS


def check_steps(steps: int) -> None:
    """Raises HyperAlignError unless there is at least one step."""
    if steps < 1:
        raise HyperAlignError(f"steps is {steps}; expected at least 1. Typical values are 20 to 30.")


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
    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    samples = comfy.sample.sample(
        model, noise, steps, cfg, sampler_name, scheduler, positive, negative, start,
        denoise=denoise, noise_mask=latent.get("noise_mask"), seed=seed,
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
    )  # fmt: skip
    return {**latent, "samples": samples}
