"""Methods that need no training: search over the initial noise, and guidance by a reward's gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hyperalign.guidance import guidance_size, guided, guided_through, prediction_size
from hyperalign.rewards import Reward
from hyperalign.search import SEEDS, Search
from train.generation.gradients import ImageValue
from train.generation.options import GuidanceOptions, Options
from train.models.base import Base, Conditions, PromptEncoder
from train.objective import without_nan
from train.rollout import Denoiser, Guide
from train.rollout import guided as with_cfg
from train.sampling import Sampler, initial_noise, seed_of

PIXELS_PER_CELL = {"tiny": 4}
"""Pixels of a latent cell's side; 8 in the other base models."""


@dataclass(slots=True)
class OnePrompt:
    """The conditions of one prompt and of the empty one, encoded once for all candidates of a search."""

    encoder: PromptEncoder
    prompt: str
    _rows: Conditions | None = None

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Returns the conditions of prompts, each of them this one or the empty one."""
        if self._rows is None:
            self._rows = self.encoder.conditions([self.prompt, ""])
        rows = [0 if prompt == self.prompt else 1 for prompt in prompts]
        return {name: value[rows] for name, value in self._rows.items()}


def search(sampler: Sampler, reward: Reward, options: Options, prompt: str, index: int, seed: int) -> Tensor:
    """Returns the best image (3, H, W) that a search over the initial noise finds; NaN if none is finite.

    The first candidate is the image that the base model draws. Which ones follow depends on the prompt's
    index and the seed alone.
    """
    sampler = replace(sampler, encoder=OnePrompt(sampler.encoder, prompt))
    first = seed_of(index, seed)

    def fresh(candidate: int) -> Tensor:
        if candidate == first:
            return initial_noise(index, seed, sampler.base.latent_shape)[None]
        generator = torch.Generator().manual_seed(candidate)
        return torch.randn((1, *sampler.base.latent_shape), generator=generator)

    state = Search[Tensor](options.search.plan(options.test_time, first % SEEDS, options.batch), fresh)
    images = torch.full((1, 3, 1, 1), math.nan)
    while candidates := state.propose():
        noise = torch.cat([candidate.noise for candidate in candidates])
        images, _ = sampler.draw([prompt] * len(candidates), noise)
        # Clones, because a view of one image would keep the memory of its whole batch.
        found = scores(reward, images.to(sampler.base.device), prompt)
        state.record(candidates, found, [image.clone() for image in images])
    return state.kept[0].sample if state.kept else images[0]


@torch.no_grad()
def scores(reward: Reward, images_BCHW: Tensor, prompt: str) -> list[float]:
    """Returns a score of each image, NaN where the image is not finite."""
    shown, finite_B = without_nan(images_BCHW)
    scores_B = reward.score(shown, [prompt] * len(shown)).float().cpu()
    return torch.where(finite_B.cpu(), scores_B, math.nan).tolist()


@dataclass(frozen=True, slots=True)
class RewardGuidance:
    """Moves the one-step predictions towards a greater reward, as ComfyUI's Reward Guidance does."""

    base: Base
    reward: Reward
    options: GuidanceOptions
    steps: int
    pixels_per_cell: int

    def guide_for(self, prompts: Sequence[str]) -> Guide:
        """Returns the guide of samples of these prompts."""
        return partial(self.move, list(prompts))

    def move(self, prompts: list[str], denoiser: Denoiser, x_BCHW: Tensor, index: int) -> Tensor | None:
        """Returns x0-hat of the noisy latents at a step, moved; None outside the guided steps."""
        options = self.options
        if not options.start <= index / self.steps <= options.end:
            return None
        t = self.base.noise_schedule.timesteps(self.steps)[index]
        sigma = self.base.noise_schedule.sigma(t)
        largest = max(1, options.decode_size // self.pixels_per_cell)
        score = ImageValue(self.base, self.reward, prompts, largest)
        if options.gradient == "through-model":
            return guided_through(x_BCHW, partial(self._predict, denoiser, t), options.strength, score)
        x0_BCHW, _ = denoiser.predictions(x_BCHW, t)
        return guided(x0_BCHW, sigma, options.strength, score)

    def _predict(self, denoiser: Denoiser, t: float, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x0-hat with its gradient to x, and the size of a step."""
        schedule = self.base.noise_schedule
        t_B = torch.full((len(x_BCHW),), t, device=x_BCHW.device)
        cond, uncond = denoiser.outputs(x_BCHW, t)
        if uncond is None:
            x0_BCHW, _ = schedule.predictions(x_BCHW, cond, t_B)
            return x0_BCHW, prediction_size(x0_BCHW, schedule.sigma(t))
        x0_BCHW, _ = schedule.predictions(x_BCHW, with_cfg(cond, uncond, denoiser.guidance_scale), t_B)
        with_prompt, without = (schedule.predictions(x_BCHW, out, t_B)[0] for out in (cond, uncond))
        return x0_BCHW, guidance_size(with_prompt, without, denoiser.guidance_scale)
