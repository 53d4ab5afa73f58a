"""Search over the noise of every denoising step, with the host's own samplers one step at a time.

The baseline that the paper calls epsilon-greedy (arXiv 2506.03164): a candidate for a step's noise is judged
by the image foreseen after that step.
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

SAMPLERS = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "ddpm", "lcm")
"""Those that add noise once a step and keep nothing from one step to the next."""

Rate = Callable[[Tensor], list[float]]
"""Scores of latents (B, ...) in the VAE's scale."""


def check_sampler(name: str) -> None:
    """Raises HyperAlignError unless a sampler's steps can be searched."""
    if name not in SAMPLERS:
        raise HyperAlignError(
            f"epsilon-greedy-steps searches the noise that a sampler adds at every step, but {name} adds "
            f"none, or remembers earlier steps. Choose one of {', '.join(SAMPLERS)}, or another mode."
        )


def sampler(name: str, plan: Plan, seed: int, rate: Rate) -> comfy.samplers.KSAMPLER:
    """Returns a sampler of the host that searches every step's noise for one latent.

    Args:
        name: one of `SAMPLERS`.
        plan: candidates per round, rounds, radius, epsilon, and how many are tried at once.
        seed: of every noise.
        rate: judges foreseen latents.
    """
    return comfy.samplers.KSAMPLER(
        _TrajectorySearch(getattr(k_diffusion, f"sample_{name}"), plan, seed, rate)
    )


def sigmas(model: Any, name: str, scheduler: str, steps: int, denoise: float) -> Tensor:
    """Returns the noise levels that the host's KSampler would go through."""
    return comfy.samplers.KSampler(
        model, steps, model.load_device, name, scheduler, denoise, model.model_options
    ).sigmas


@dataclass(frozen=True, slots=True)
class _TrajectorySearch:
    """What the host calls as a sampler's function."""

    one_step: Callable[..., Tensor]
    plan: Plan
    seed: int
    rate: Rate

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
            finished = float(sigmas[index + 1]) == 0.0  # nothing is added to a finished image
            x = mean if finished else step.take(epsilon_greedy(self.plan, step.fresh, step.rate, chance))
        return x


class _Step:
    """One step from one latent (1, ...), with any noise: the model looks at the latent only once."""

    def __init__(
        self,
        search: _TrajectorySearch,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        generator: torch.Generator,
    ) -> None:
        self.inner_model = model.inner_model  # the host's samplers look for it
        self.predictions: list[Tensor] = []
        """What the model foresaw from the latent, and on the way for samplers of order 2."""
        self._search = search
        self._model = model
        self._x = x
        self._sigmas = sigmas
        self._extra_args = extra_args
        self._generator = generator
        self._calls = 0

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """Is the model to the host's sampler; noise is added last, so all runs of a step ask the same."""
        self._calls += 1
        if self._calls > len(self.predictions):
            self.predictions.append(self._model(x, sigma, **extra_args))
        return self.predictions[self._calls - 1]

    def take(self, noise: Tensor) -> Tensor:
        """Returns the latents (B, ...) after the step with noise (B, ...)."""

        def given(_sigma: Tensor, _sigma_next: Tensor) -> Tensor:
            return noise

        self._calls = 0
        x = self._x.expand_as(noise)
        return self._search.one_step(
            self, x, self._sigmas, self._extra_args, disable=True, noise_sampler=given
        )

    def fresh(self) -> Tensor:
        """Returns standard normal noise (1, ...)."""
        return torch.randn(self._x.shape, generator=self._generator).to(self._x)

    def rate(self, candidates: list[Tensor]) -> list[float]:
        """Returns the score of the image foreseen after the step, for each noise."""
        size, scores = self._search.plan.batch, list[float]()
        for at in range(0, len(candidates), size):
            x = self.take(torch.cat(candidates[at : at + size]))
            x0 = self._model(x, self._sigmas[1].expand(len(x)), **self._extra_args)
            scores += self._search.rate(self.inner_model.inner_model.process_latent_out(x0))
            self._load_model()
        return scores

    def _load_model(self) -> None:
        """Has the host put the model back, if VAE or reward took its place."""
        guider = self.inner_model
        comfy.model_management.throw_exception_if_processing_interrupted()
        comfy.sampler_helpers.prepare_sampling(
            guider.model_patcher, self._x.shape, guider.conds, guider.model_options
        )
