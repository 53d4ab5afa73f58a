"""Noise schedules: how noise is mixed into latents, and what a model predicts of the mixture.

Every schedule is x_t = alpha(t) x0 + sigma(t) eps, with eps standard normal noise.

- Diffusion (Ho et al. 2020): alpha = sqrt(abar), sigma = sqrt(1 - abar); the model predicts eps, or
  v = alpha eps - sigma x0 (Salimans and Ho 2022).
- Rectified flow (Liu et al. 2022): alpha = 1 - u, sigma = u; the model predicts v = eps - x0.

Timesteps t are the model's own: 0 to 999 for diffusion, 0 to 1 or to 1,000 for a flow. u = t / last_timestep
is their fraction, 1 at pure noise and 0 at the image.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from hyperalign.families.unet import LAST_TIMESTEP

TRAIN_STEPS = 1000
Fraction = TypeVar("Fraction", float, Tensor)


def trailing_timesteps(steps: int, train_steps: int = TRAIN_STEPS) -> list[int]:
    """Returns falling timesteps that start at pure noise: 999, ... for 1,000 training steps."""
    return [round(train_steps - i * train_steps / steps) - 1 for i in range(steps)]


def alphas_cumprod(train_steps: int = TRAIN_STEPS, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Returns Stable Diffusion's alpha-bar for every timestep."""
    betas = torch.linspace(start**0.5, end**0.5, train_steps, dtype=torch.float64).square()
    return (1.0 - betas).cumprod(0).float()


def shifted(u: Fraction, shift: float) -> Fraction:
    """Returns a flow's u moved towards the noise (Esser et al. 2024, eq 23): s u / (1 + (s - 1) u)."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def resolution_shift(tokens: int) -> float:
    """Returns FLUX.1's shift for a number of image tokens: e^mu, mu from 0.5 at 256 to 1.15 at 4,096."""
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


class NoiseSchedule(Protocol):
    """alpha(t), sigma(t) and the parametrisation of the model's output."""

    @property
    def last_timestep(self) -> float:
        """The timestep of pure noise."""
        ...

    def timesteps(self, steps: int) -> list[float]:
        """Returns the falling timesteps of a deterministic sampler, the first at pure noise."""
        ...

    def nearest(self, u_B: Tensor) -> Tensor:
        """Returns the timesteps nearest to fractions u in [0, 1]."""
        ...

    def at_position(self, position_B: Tensor) -> Tensor:
        """Returns the timesteps at positions of a run in [0, 1], 1 at its start.

        The sampler's steps are evenly spread over positions, so training at even positions sees what
        sampling sees.
        """
        ...

    def add_noise(self, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """Returns x_t = alpha(t) x0 + sigma(t) eps."""
        ...

    def predictions(self, x_t: Tensor, output: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the one-step prediction x0-hat, and eps-hat: x_t = alpha x0-hat + sigma eps-hat."""
        ...

    def sigma(self, t: float) -> float:
        """Returns the noise level of a timestep as samplers count it."""
        ...

    def target(self, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """Returns what the model's output should be."""
        ...

    def signal(self, t_B: Tensor) -> Tensor:
        """Returns the image's share (B,) of the latents' variance: alpha^2 / (alpha^2 + sigma^2)."""
        ...

    def loss_weight(self, t_B: Tensor, snr_gamma: float) -> Tensor:
        """Returns the weights (B,) of the denoising loss, 1 where `snr_gamma` is infinite."""
        ...


def implied_noise(schedule: NoiseSchedule, x_t: Tensor, x0: Tensor, t_B: Tensor) -> Tensor:
    """Returns the eps of x_t = alpha(t) x0 + sigma(t) eps for a given x0."""
    zero = torch.zeros_like(x_t)
    return (x_t - schedule.add_noise(x0, zero, t_B)) / schedule.add_noise(zero, torch.ones_like(x_t), t_B)


def _like(values_B: Tensor, x: Tensor) -> Tensor:
    return values_B.to(x).view(-1, *[1] * (x.ndim - 1))


class DiffusionSchedule:
    """Variance-preserving diffusion with Stable Diffusion's alpha-bar (Ho et al. 2020)."""

    def __init__(self, prediction: Literal["epsilon", "v_prediction"] = "epsilon") -> None:
        self.prediction = prediction
        self.last_timestep = LAST_TIMESTEP
        self._alpha_bar = alphas_cumprod()
        self._copies: dict[torch.device, Tensor] = {}

    def timesteps(self, steps: int) -> list[float]:
        """Returns trailing timesteps (Lin et al. 2023, arXiv 2305.08891)."""
        return [float(t) for t in trailing_timesteps(steps)]

    def nearest(self, u_B: Tensor) -> Tensor:
        """Returns whole timesteps."""
        return (u_B * self.last_timestep).round()

    def at_position(self, position_B: Tensor) -> Tensor:
        """Returns whole timesteps: positions are fractions u."""
        return self.nearest(position_B)

    def add_noise(self, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """Returns x_t = sqrt(abar) x0 + sqrt(1 - abar) eps."""
        abar = self._abar(t_B, x0)
        return abar.sqrt() * x0 + (1.0 - abar).sqrt() * eps

    def predictions(self, x_t: Tensor, output: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x0-hat = (x_t - sqrt(1 - abar) eps-hat) / sqrt(abar) (Eq 4), and eps-hat.

        A model that predicts v has x0-hat = sqrt(abar) x_t - sqrt(1 - abar) v, and
        eps-hat = sqrt(1 - abar) x_t + sqrt(abar) v.
        """
        abar = self._abar(t_B, x_t)
        if self.prediction == "epsilon":
            return (x_t - (1.0 - abar).sqrt() * output) / abar.sqrt(), output
        return (
            abar.sqrt() * x_t - (1.0 - abar).sqrt() * output,
            (1.0 - abar).sqrt() * x_t + abar.sqrt() * output,
        )

    def sigma(self, t: float) -> float:
        """Returns sqrt((1 - abar) / abar) (Karras et al. 2022)."""
        abar = float(self._alpha_bar[round(t)])
        return math.sqrt((1.0 - abar) / abar)

    def target(self, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """Returns eps, or v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans and Ho 2022)."""
        if self.prediction == "epsilon":
            return eps
        abar = self._abar(t_B, x0)
        return abar.sqrt() * eps - (1.0 - abar).sqrt() * x0

    def signal(self, t_B: Tensor) -> Tensor:
        """Returns abar, as alpha^2 + sigma^2 = 1."""
        return self._alpha_bar_on(t_B.device)[t_B.long()]

    def loss_weight(self, t_B: Tensor, snr_gamma: float) -> Tensor:
        """Returns min-SNR-gamma weights (Hang et al. 2023, arXiv 2303.09556).

        They are min(snr, gamma) / snr, or min(snr, gamma) / (snr + 1) for v, with snr = abar / (1 - abar).
        """
        abar = self.signal(t_B)
        snr = abar / (1.0 - abar)
        if self.prediction == "epsilon":
            return snr.clamp(max=snr_gamma) / snr
        return torch.ones_like(snr) if math.isinf(snr_gamma) else snr.clamp(max=snr_gamma) / (snr + 1.0)

    def _abar(self, t_B: Tensor, x: Tensor) -> Tensor:
        return _like(self._alpha_bar_on(x.device)[t_B.to(x.device).long()], x)

    def _alpha_bar_on(self, device: torch.device) -> Tensor:
        if device not in self._copies:  # a GPU would wait for each new copy
            self._copies[device] = self._alpha_bar.to(device)
        return self._copies[device]


class FlowSchedule:
    """Rectified flow: x_t = (1 - u) x0 + u eps, the model predicts v = eps - x0 (Eq 12 to 16)."""

    def __init__(self, last_timestep: float, shift: float) -> None:
        """`last_timestep` is the model's timestep at u = 1; `shift` moves the sampler's timesteps."""
        self.last_timestep = last_timestep
        self.shift = shift

    def timesteps(self, steps: int) -> list[float]:
        """Returns evenly spread timesteps, shifted towards the noise."""
        return [self.last_timestep * shifted(1.0 - i / steps, self.shift) for i in range(steps)]

    def nearest(self, u_B: Tensor) -> Tensor:
        """Returns u in the model's unit."""
        return u_B * self.last_timestep

    def at_position(self, position_B: Tensor) -> Tensor:
        """Returns positions shifted towards the noise, as the sampler's steps are."""
        return self.last_timestep * shifted(position_B, self.shift)

    def add_noise(self, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """Returns x_t = (1 - u) x0 + u eps."""
        u = self._u(t_B, x0)
        return (1.0 - u) * x0 + u * eps

    def predictions(self, x_t: Tensor, output: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x0-hat = x_t - u v, and eps-hat = x_t + (1 - u) v."""
        u = self._u(t_B, x_t)
        return x_t - u * output, x_t + (1.0 - u) * output

    def sigma(self, t: float) -> float:
        """Returns u."""
        return t / self.last_timestep

    def target(self, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """Returns the velocity v = eps - x0."""
        return eps - x0

    def signal(self, t_B: Tensor) -> Tensor:
        """Returns (1 - u)^2 / ((1 - u)^2 + u^2)."""
        u_B = t_B / self.last_timestep
        return (1.0 - u_B).square() / ((1.0 - u_B).square() + u_B.square())

    def loss_weight(self, t_B: Tensor, snr_gamma: float) -> Tensor:
        """Returns 1: the velocity's error is bounded at every timestep."""
        return torch.ones_like(t_B, dtype=torch.float32)

    def _u(self, t_B: Tensor, x: Tensor) -> Tensor:
        return _like(t_B / self.last_timestep, x)
