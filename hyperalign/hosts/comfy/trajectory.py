"""Search over the noise of every denoising step, with the host's own samplers one step at a time.

The baseline that the paper calls epsilon-greedy (arXiv 2506.03164): a noise candidate of a step is scored by
the image predicted after that step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.k_diffusion import sampling as k_diffusion
from torch import Tensor

from ...errors import HyperAlignError
from ...search import Plan, epsilon_greedy
from .run import trials

SAMPLERS = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "ddpm", "lcm")
"""Samplers that add noise once per step and keep no state between steps."""

Score = Callable[[Tensor], list[float]]
"""Returns the scores of latents (B, ...) in the VAE's scale."""


def check_sampler(name: str) -> None:
    """Raises HyperAlignError unless a sampler's steps can be searched."""
    if name not in SAMPLERS:
        raise HyperAlignError(
            f"epsilon-greedy-steps searches the noise that a sampler adds at every step, but {name} adds "
            f"none, or keeps state of earlier steps. Choose one of {', '.join(SAMPLERS)}, or another mode."
        )


def sampler(name: str, plan: Plan, seed: int, score: Score) -> comfy.samplers.KSAMPLER:
    """Returns a host sampler that searches the noise of every step for one latent.

    Args:
        name: one of `SAMPLERS`.
        plan: candidates per round, rounds, radius, epsilon and batch size.
        seed: seed of all noise.
        score: scores predicted latents.
    """
    return comfy.samplers.KSAMPLER(
        _TrajectorySearch(getattr(k_diffusion, f"sample_{name}"), plan, seed, score)
    )


def sigmas(model: Any, name: str, scheduler: str, steps: int, denoise: float) -> Tensor:
    """Returns the noise levels of the host's KSampler."""
    return comfy.samplers.KSampler(
        model, steps, model.load_device, name, scheduler, denoise, model.model_options
    ).sigmas


@dataclass(frozen=True, slots=True)
class _TrajectorySearch:
    """A sampler function for the host."""

    one_step: Callable[..., Tensor]
    plan: Plan
    seed: int
    score: Score

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        chance = random.Random(self.seed)
        generator = torch.Generator().manual_seed(chance.getrandbits(63))
        for index in range(len(sigmas) - 1):
            step = _Step(self, model, x, sigmas[index : index + 2], extra_args, generator)
            mean = step.take(torch.zeros_like(x))
            if callback is not None:
                callback({"x": x, "i": index, "denoised": step.predictions[0]})
            finished = float(sigmas[index + 1]) == 0.0  # no noise is added to a finished image
            x = mean if finished else step.take(epsilon_greedy(self.plan, step.fresh, step.scores, chance))
        return x


class _Step:
    """One step from one latent (1, ...) with any noise; the model is evaluated at this latent only once."""

    def __init__(
        self,
        search: _TrajectorySearch,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        generator: torch.Generator,
    ) -> None:
        self.inner_model = model.inner_model  # used by the host's samplers
        self.predictions: list[Tensor] = []
        """The model's predictions at the latent and, for samplers of order 2, at intermediate points."""
        self._search = search
        self._model = model
        self._x = x
        self._sigmas = sigmas
        self._extra_args = extra_args
        self._generator = generator
        self._calls = 0

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """Acts as the model of the host's sampler; noise is added last, so every run makes the same calls."""
        self._calls += 1
        if self._calls > len(self.predictions):
            self.predictions.append(self._model(x, sigma, **extra_args))
        return self.predictions[self._calls - 1]

    def take(self, noise: Tensor) -> Tensor:
        """Returns the latents (B, ...) after the step with noise (B, ...)."""

        def noise_sampler(_sigma: Tensor, _sigma_next: Tensor) -> Tensor:
            return noise

        self._calls = 0
        x = self._x.expand_as(noise)
        return self._search.one_step(
            self, x, self._sigmas, self._extra_args, disable=True, noise_sampler=noise_sampler
        )

    def fresh(self) -> Tensor:
        """Returns standard normal noise (1, ...)."""
        return torch.randn(self._x.shape, generator=self._generator).to(self._x)

    def scores(self, candidates: list[Tensor]) -> list[float]:
        """Returns the score of the image predicted after the step, for each noise."""
        size, scores = self._search.plan.batch, list[float]()
        for at in range(0, len(candidates), size):
            x = self.take(torch.cat(candidates[at : at + size]))
            with trials(self.inner_model.model_options.get("transformer_options", {}), len(x)):
                x0 = self._model(x, self._sigmas[1].expand(len(x)), **self._extra_args)
            scores += self._search.score(self.inner_model.inner_model.process_latent_out(x0))
            self._load_model()
        return scores

    def _load_model(self) -> None:
        """Makes the host load the model again, if VAE or reward replaced it."""
        guider = self.inner_model
        comfy.model_management.throw_exception_if_processing_interrupted()
        comfy.sampler_helpers.prepare_sampling(
            guider.model_patcher, self._x.shape, guider.conds, guider.model_options
        )
