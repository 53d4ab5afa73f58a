"""Samples images of prompts at seeds, with a base model and an optional hypernetwork."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperalign.checkpoint import HyperAlign
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.schedule import Schedule
from train.models.base import Base, PromptEncoder, cfg_conditions
from train.objective import without_nan
from train.rollout import rollout

BATCH = 32


@dataclass(frozen=True, slots=True)
class SampledImages:
    """Images of P prompts at S seeds."""

    prompts: list[str]
    images: Tensor
    """(P, S, 3, H, W) in [0, 1], on the CPU; grey where the sampled one was not finite."""
    seconds_per_image: float
    generations_per_run: int
    finite: Tensor
    """(P, S): whether each image was; the others are scored as grey ones, and a run goes on."""

    @property
    def not_finite(self) -> float:
        """Share of images that were not finite."""
        return float((~self.finite).float().mean())


def initial_noise(prompt_index: int, seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Returns the noise of one image; it depends on the prompt's index and the seed alone."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + prompt_index)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def sample(
    base: Base,
    encoder: PromptEncoder,
    hyperalign: HyperAlign | None,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    strength: float = 1.0,
    bf16: bool = False,
    batch: int = BATCH,
    indices: Sequence[int] | None = None,
) -> SampledImages:
    """Samples every prompt at every seed; `hyperalign` None samples the base model.

    `indices` are the prompts' places in the whole list, which decide their noise; None for a whole list.
    """
    indices = range(len(prompts)) if indices is None else indices
    jobs = [(index, seed) for index in range(len(prompts)) for seed in seeds]
    adapter = Adapter(base.backbone, hyperalign) if hyperalign else None
    schedule = hyperalign.header.schedule if hyperalign else Schedule("I")
    images: list[Tensor] = []
    generations = 0
    started = time.monotonic()
    for first in range(0, len(jobs), batch):
        chunk = jobs[first : first + batch]
        cond, uncond = cfg_conditions(base, encoder, [prompts[index] for index, _ in chunk], guidance_scale)
        noises = [initial_noise(indices[index], seed, base.latent_shape) for index, seed in chunk]
        noise = torch.stack(noises).to(base.device)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=bf16):
            trajectory = rollout(
                base, adapter, schedule, cond, uncond, noise,
                steps=steps, guidance_scale=guidance_scale, strength=strength,
            )  # fmt: skip
            images.append(base.decode(trajectory.final).float().clamp(0.0, 1.0).cpu())
        generations = trajectory.generations
    seconds = (time.monotonic() - started) / len(jobs)
    shown, finite = without_nan(torch.cat(images))
    stacked, marks = (values.unflatten(0, (len(prompts), len(seeds))) for values in (shown, finite))
    return SampledImages(list(prompts), stacked, seconds, generations, marks)
