"""FreeDoM (Yu et al. 2023, arXiv 2303.09833, algorithms 1 and 2): an energy's gradient through the model.

In the middle of a run each DDPM step is moved up the reward's gradient to x_t, and taken several times: time
travel renoises x_s to x_t and goes on from there. The step's size is the authors' for Stable Diffusion,
0.2 w rms(e_c - e_u) / rms(g); where guidance is an input of the model, 0.2 (u_t - u_s) rms(v) / rms(g).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hyperalign.schedule import Schedule
from train.generation.gradients import ImageValue, evaluated, shift, step_size
from train.generation.options import FreedomOptions
from train.models.base import cfg_conditions
from train.rollout import Denoiser, SampledModel
from train.sampling import Sampler
from train.transitions import ddim, renoised


@dataclass(frozen=True, slots=True)
class Freedom:
    """Draws images steered by a reward."""

    sampler: Sampler
    value: ImageValue
    options: FreedomOptions

    def draw(self, noise_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Returns images (B, 3, H, W) on the CPU; each sample has random numbers of its own."""
        sampler, own = self.sampler, self.options
        base, schedule, steps = sampler.base, sampler.base.noise_schedule, sampler.steps
        cond, uncond = cfg_conditions(base, sampler.encoder, list(self.value.prompts), sampler.guidance_scale)
        denoiser = Denoiser(
            SampledModel(base, None, Schedule("I"), 1.0), cond, uncond, sampler.guidance_scale
        )
        timesteps, move = schedule.timesteps(steps), ddim(own.eta)
        x = noise_BCHW.to(base.device)

        def normal() -> Tensor:
            own = [torch.randn(x.shape[1:], generator=generator) for generator in generators]
            return torch.stack(own).to(x)

        for (t, s), (travels, guided) in zip(pairwise(timesteps), own.plan(steps), strict=True):
            for repeat in range(travels):
                if repeat:
                    x = renoised(schedule, x, s, t, normal())
                if guided:
                    found = evaluated(denoiser, schedule, x, t, self.value)
                    step = move(schedule, x, found.x0, found.eps, t, s).sample(normal())
                    x = step + shift(
                        found, own.strength, step_size(found, schedule, sampler.guidance_scale, t, s)
                    )
                else:
                    with torch.no_grad():
                        x0, eps = denoiser.predictions(x, t)
                    x = move(schedule, x, x0, eps, t, s).sample(normal())
        with torch.no_grad():
            x0, _ = denoiser.predictions(x, timesteps[-1])
            return base.decode(x0).float().clamp(0.0, 1.0).cpu()
