"""FreeDoM (Yu et al. 2023, arXiv 2303.09833, algorithms 1 and 2): an energy's gradient through the model.

In the middle of a run each DDPM step is moved up the reward's gradient to x_t, and taken several times: time
travel renoises x_s to x_t and goes on from there. The step's size is the authors' for Stable Diffusion,
0.2 w rms(e_c - e_u) / rms(g); where guidance is an input of the model, 0.2 (u_t - u_s) rms(v) / rms(g).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperalign.schedule import Schedule
from train.generation.gradients import Evaluated, ImageValue, evaluated, rms
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

        for index, (guided, times) in enumerate(visits(own, steps)):
            t, s = timesteps[index], timesteps[index + 1]
            for repeat in range(times):
                if repeat:
                    x = renoised(schedule, x, s, t, normal())
                if guided:
                    found = evaluated(denoiser, schedule, x, t, self.value)
                    step = move(schedule, x, found.x0, found.eps, t, s).sample(normal())
                    x = step + shift(found, own.strength, self._size(found, t, s))
                else:
                    with torch.no_grad():
                        x0, eps = denoiser.predictions(x, t)
                    x = move(schedule, x, x0, eps, t, s).sample(normal())
        with torch.no_grad():
            x0, _ = denoiser.predictions(x, timesteps[-1])
            return base.decode(x0).float().clamp(0.0, 1.0).cpu()

    def _size(self, found: Evaluated, t: float, s: float) -> Tensor:
        """Returns what a step is relative to: guidance, or the way of a flow's step."""
        if found.correction is not None:
            return abs(self.sampler.guidance_scale) * rms(found.correction)
        schedule = self.sampler.base.noise_schedule
        return (schedule.sigma(t) - schedule.sigma(s)) * rms(found.eps - found.x0)


def visits(options: FreedomOptions, steps: int) -> list[tuple[bool, int]]:
    """Returns, for each step but the last, whether it is guided and how often it is taken."""
    shares_left = [(steps - 1 - index) / steps for index in range(steps - 1)]
    (first, last), (low, high) = options.guided, options.travelled
    return [(first <= left < last, options.travels if low <= left < high else 1) for left in shares_left]


def shift(found: Evaluated, strength: float, size_B111: Tensor) -> Tensor:
    """Returns the gradient with a root mean square of strength times size in each sample."""
    return strength * size_B111 * found.gradient / rms(found.gradient).clamp_min(1e-12)
