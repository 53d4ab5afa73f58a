"""Sampling with the current hypernetwork: DDIM rollouts whose states the reward loss starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperalign.families.unet import LAST_TIMESTEP
from hyperalign.hosts.diffusers import Adapter, unet_call
from hyperalign.schedule import Schedule


def trailing_timesteps(steps: int, train_steps: int = 1000) -> list[int]:
    """Returns falling timesteps that start at pure noise: 999, ... for 1,000 training steps."""
    return [round(train_steps - i * train_steps / steps) - 1 for i in range(steps)]


def alphas_cumprod(train_steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Returns Stable Diffusion's alpha-bar for every timestep."""
    betas = torch.linspace(start**0.5, end**0.5, train_steps, dtype=torch.float64).square()
    return (1.0 - betas).cumprod(0).float()


def predict_x0(x_t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Returns the one-step prediction x0-hat (Eq 4): (x_t - sqrt(1 - abar) eps) / sqrt(abar)."""
    return (x_t - (1.0 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Returns x_t = sqrt(abar) x0 + sqrt(1 - abar) noise."""
    return alpha_bar.sqrt() * x0 + (1.0 - alpha_bar).sqrt() * noise


def guided(eps_both: Tensor, guidance: float) -> Tensor:
    """Returns the classifier-free guided prediction of a batch that stacks cond on uncond rows."""
    cond, uncond = eps_both.chunk(2)
    return uncond + guidance * (cond - uncond)


@dataclass(slots=True)
class Trajectory:
    """A rollout: states x_t (before each step) and when weights were written."""

    states: list[Tensor]
    timesteps: list[int]
    generated_at: list[int]
    """For each step, the index of the step that wrote the weights it used."""
    generations: int
    predictions: list[Tensor]
    """x0-hat of each step."""
    final: Tensor


class Weights:
    """The weights of one run for all its rows, renewed when the schedule says so."""

    def __init__(self, adapter: Adapter | None, schedule: Schedule, strength: float = 1.0) -> None:
        self.adapter, self.schedule, self.strength = adapter, schedule, strength
        self.cores: Tensor | None = None
        self.segment: int | None = None
        self.generations = 0

    def predict(self, unet: torch.nn.Module, x: Tensor, t: int, context: Tensor) -> Tensor:
        """Returns eps for rows (x, t, context), generating first when due."""
        t_B = torch.full((x.shape[0],), t, device=x.device)
        if self.adapter is None:
            return unet(x, t_B, context).sample
        u = t / LAST_TIMESTEP
        if not self.schedule.is_due(u, self.segment):
            return self.adapter.forward(unet_call(x, t_B, context), self.cores, self.strength)
        self.segment = self.schedule.segment(u)
        self.generations += 1
        eps, self.cores = self.adapter.generate_and_forward(unet_call(x, t_B, context), self.strength)
        return eps


@torch.no_grad()
def rollout(
    unet: torch.nn.Module,
    adapter: Adapter | None,
    schedule: Schedule,
    context_2BLC: Tensor,
    noise_BCHW: Tensor,
    *,
    steps: int,
    guidance: float,
    strength: float = 1.0,
) -> Trajectory:
    """Samples with deterministic DDIM (Song et al. 2021, eq 12 with eta 0).

    Args:
        unet: the base model.
        adapter: adapts it; None samples the base.
        schedule: when weights are written.
        context_2BLC: cond rows stacked on uncond rows.
        noise_BCHW: the initial noise.
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        strength: strength of the adaptation.
    """
    alphas = alphas_cumprod().to(noise_BCHW)
    timesteps = trailing_timesteps(steps)
    weights = Weights(adapter, schedule, strength)
    x, states, generated_at, predictions = noise_BCHW, list[Tensor](), list[int](), list[Tensor]()
    for index, t in enumerate(timesteps):
        before = weights.generations
        states.append(x)
        eps = guided(weights.predict(unet, torch.cat([x, x]), t, context_2BLC).float(), guidance)
        generated_at.append(index if weights.generations > before or not generated_at else generated_at[-1])
        x0 = predict_x0(x, eps, alphas[t])
        predictions.append(x0)
        last = index + 1 == steps
        x = x0 if last else add_noise(x0, eps, alphas[timesteps[index + 1]])
    return Trajectory(states, timesteps, generated_at, weights.generations, predictions, x)
