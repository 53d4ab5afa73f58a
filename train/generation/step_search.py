"""Epsilon-greedy search over the noise of every step (Ramesh and Mardani 2025, arXiv 2506.03164).

From x_t, with DDIM's step of noise eta (its like for a flow), K rounds of N candidates look for the noise
whose x_s has the best image: a candidate's score is the reward of the decoded one-step prediction at x_s and
s. The authors' release evaluates x_s at t, a noise level that it no longer has; that is a mistake and not
repeated here. The rule of the rounds is `hyperalign.search.epsilon_greedy`, as in ComfyUI's
epsilon-greedy-steps. The reward needs no gradient.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hyperalign.rewards import Reward
from hyperalign.schedule import Schedule
from hyperalign.search import epsilon_greedy, near
from train.generation.options import StepSearchOptions
from train.generation.test_time import scores
from train.models.base import cfg_conditions, repeat
from train.rollout import Denoiser, SampledModel
from train.sampling import Sampler, initial_noise, seed_of
from train.transitions import SMALLEST_STD, Gaussian, ddim

Predict = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""Noisy latents (B, C, H, W) and their timestep -> x0-hat and eps-hat."""


@dataclass(frozen=True, slots=True)
class StepSearch:
    """Draws images whose every step has searched noise, one at a time."""

    sampler: Sampler
    reward: Reward
    options: StepSearchOptions
    batch: int
    """Candidates that are evaluated at once."""

    @torch.no_grad()
    def draw(self, prompt: str, index: int, seed: int) -> Tensor:
        """Returns the image (3, H, W) on the CPU; the prompt's index and the seed decide all random numbers.

        The initial noise is the base model's own, and steps without noise are not searched.
        """
        base, own = self.sampler.base, seed_of(index, seed)
        schedule, move, predict = base.noise_schedule, ddim(self.options.eta), self._predictor(prompt)
        generator, rng = torch.Generator().manual_seed(own), random.Random(own)
        x = initial_noise(index, seed, base.latent_shape)[None].to(base.device)

        def fresh() -> Tensor:
            return torch.randn((1, *base.latent_shape), generator=generator)

        timesteps = schedule.timesteps(self.sampler.steps)
        for t, s in pairwise(timesteps):
            step = move(schedule, x, *predict(x, t), t, s)
            if step.std > SMALLEST_STD:
                x = step.sample(self._searched(step, s, prompt, predict, fresh, rng).to(x))
            else:
                x = step.sample(fresh().to(x))
        x0, _ = predict(x, timesteps[-1])
        return base.decode(x0)[0].float().clamp(0.0, 1.0).cpu()

    def _searched(
        self,
        step: Gaussian,
        s: float,
        prompt: str,
        predict: Predict,
        fresh: Callable[[], Tensor],
        rng: random.Random,
    ) -> Tensor:
        """Returns the noise (1, C, H, W) of a step to s."""

        def score(candidates: list[Tensor]) -> list[float]:
            found = list[float]()
            for first in range(0, len(candidates), self.batch):
                noise = torch.cat(candidates[first : first + self.batch]).to(step.mean)
                x0, _ = predict(step.sample(noise), s)
                images = self.sampler.base.decode(x0).float().clamp(0.0, 1.0)
                found += scores(self.reward, images, prompt)
            return found

        own = self.options
        neighbour = near if own.rescale else perturbed
        return epsilon_greedy(own.plan(), fresh, score, rng, neighbour, own.keep_best)

    def _predictor(self, prompt: str) -> Predict:
        """Returns the base model's one-step predictions of one prompt, for any number of latents."""
        base, scale = self.sampler.base, self.sampler.guidance_scale
        cond, uncond = cfg_conditions(base, self.sampler.encoder, [prompt], scale)
        model = SampledModel(base, None, Schedule("I"), 1.0)

        def predict(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            empty = None if uncond is None else repeat(uncond, len(x))
            return Denoiser(model, repeat(cond, len(x)), empty, scale).predictions(x, t)

        return predict


def perturbed(pivot: Tensor, fresh: Tensor, radius: float) -> Tensor:
    """Returns pivot + radius sqrt(D) d, with the direction d of fresh noise of D dimensions."""
    return pivot + radius * math.sqrt(pivot.numel()) * fresh / fresh.norm()
