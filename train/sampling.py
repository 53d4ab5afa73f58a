"""Samples images of prompts at seeds, with a base model and an optional hypernetwork."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hyperalign.checkpoint import HyperAlign
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.run_state import Run
from hyperalign.schedule import Schedule
from train.models.base import Base, PromptEncoder, cfg_conditions
from train.objective import without_nan
from train.rollout import Guide, rollout

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


def seed_of(prompt_index: int, seed: int) -> int:
    """Returns a seed for the further random numbers of one image, by its prompt's index and its seed."""
    return int(np.random.SeedSequence((seed, prompt_index)).generate_state(1, np.uint64)[0])


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws images of prompts from initial noise, with fixed settings."""

    base: Base
    encoder: PromptEncoder
    adapter: Adapter | None
    """None samples the base model."""
    steps: int
    guidance_scale: float
    strength: float = 1.0
    bf16: bool = False
    guide_for: Callable[[Sequence[str]], Guide] | None = None
    """Returns what moves the one-step predictions of these prompts."""

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], noise_BCHW: Tensor, run: Run | None = None) -> tuple[Tensor, int]:
        """Returns an image of each prompt (B, 3, H, W) in [0, 1] on the CPU, and how often weights were made.

        Images that are not finite stay so. `run` keeps the weights, or gives them; None for a run of its own.
        """
        base = self.base
        cond, uncond = cfg_conditions(base, self.encoder, prompts, self.guidance_scale)
        schedule = self.adapter.header.schedule if self.adapter else Schedule("I")
        with torch.autocast(base.device.type, torch.bfloat16, enabled=self.bf16):
            trajectory = rollout(
                base, self.adapter, schedule, cond, uncond, noise_BCHW.to(base.device),
                steps=self.steps, guidance_scale=self.guidance_scale, strength=self.strength,
                run=run, guide=None if self.guide_for is None else self.guide_for(prompts),
            )  # fmt: skip
            images = base.decode(trajectory.final).float().clamp(0.0, 1.0).cpu()
        return images, trajectory.generations


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
    adapter = Adapter(base.backbone, hyperalign) if hyperalign else None
    sampler = Sampler(base, encoder, adapter, steps, guidance_scale, strength, bf16)
    return draw_all(sampler, prompts, seeds, batch, indices)


@torch.no_grad()
def draw_all(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch: int,
    indices: Sequence[int] | None = None,
    run_of: Callable[[slice], Run | None] = lambda _: None,
) -> SampledImages:
    """Draws every prompt at every seed, a batch at a time; a prompt's seeds are neighbours.

    Args:
        sampler: draws a batch.
        prompts: the prompts.
        seeds: of the noise.
        batch: images to draw at once.
        indices: the prompts' places in the whole list, which decide their noise; None for a whole list.
        run_of: which images a batch draws -> what keeps or gives its weights.
    """
    indices = range(len(prompts)) if indices is None else indices
    jobs = [(index, seed) for index in range(len(prompts)) for seed in seeds]
    shape = sampler.base.latent_shape
    images: list[Tensor] = []
    generations = 0
    started = time.monotonic()
    for first in range(0, len(jobs), batch):
        chunk = jobs[first : first + batch]
        noises = [initial_noise(indices[index], seed, shape) for index, seed in chunk]
        run = run_of(slice(first, first + len(chunk)))
        drawn, generations = sampler.draw([prompts[index] for index, _ in chunk], torch.stack(noises), run)
        images.append(drawn)
    seconds = (time.monotonic() - started) / len(jobs)
    shown, finite = without_nan(torch.cat(images))
    stacked, marks = (values.unflatten(0, (len(prompts), len(seeds))) for values in (shown, finite))
    return SampledImages(list(prompts), stacked, seconds, generations, marks)
