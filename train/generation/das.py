"""DAS (Kim et al. 2025, arXiv 2501.05803): tempered sequential Monte Carlo over a sampler's steps.

K particles of one prompt run down DDIM with noise eta (its like for a flow); what is drawn is the one of
greatest weight. `particles.py` has the algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hyperalign.schedule import Schedule
from train.generation.gradients import ImageValue, evaluated
from train.generation.options import DasOptions
from train.generation.particles import Predicted, particle_run
from train.models.base import cfg_conditions
from train.rollout import Denoiser, SampledModel
from train.sampling import Sampler, seed_of
from train.transitions import Gaussian, ddim


@dataclass(frozen=True, slots=True)
class Das:
    """Draws images of a reward-tilted distribution, one at a time."""

    sampler: Sampler
    value: ImageValue
    options: DasOptions

    def draw(self, index: int, seed: int) -> Tensor:
        """Returns the image (3, H, W); the prompt's index and the seed decide all random numbers."""
        sampler, count = self.sampler, self.options.particles
        own = seed_of(index, seed)
        generator = torch.Generator().manual_seed(own)
        rng = np.random.default_rng(own)
        base, schedule = sampler.base, sampler.base.noise_schedule
        prompts = list(self.value.prompts)
        cond, uncond = cfg_conditions(base, sampler.encoder, prompts, sampler.guidance_scale)
        model = SampledModel(base, None, Schedule("I"), 1.0)
        denoiser = Denoiser(model, cond, uncond, sampler.guidance_scale)
        timesteps, alpha = schedule.timesteps(sampler.steps), self.options.alpha
        step = ddim(self.options.eta)

        def predict(x: Tensor, at: int) -> Predicted:
            found = evaluated(denoiser, schedule, x, timesteps[at], lambda x0: self.value(x0) / alpha)
            if at + 1 == sampler.steps:
                return Predicted(Gaussian(found.x0, 0.0), found.value_B, found.gradient)
            own = step(schedule, x, found.x0, found.eps, timesteps[at], timesteps[at + 1])
            return Predicted(own, found.value_B, found.gradient)

        @torch.no_grad()
        def final_reward(x: Tensor) -> Tensor:
            return self.value(x) / alpha

        noise = torch.randn((count, *base.latent_shape), generator=generator).to(base.device)
        found = particle_run(noise, sampler.steps, predict, final_reward, generator, rng)
        with torch.no_grad():
            return base.decode(found.x[found.best()][None])[0].float().clamp(0.0, 1.0).cpu()
