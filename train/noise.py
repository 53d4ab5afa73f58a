"""How noise is mixed into latents and what a model predicts of it: diffusion and flow matching.

Both are x_t = a(t) x0 + s(t) noise; they differ in a, s and in what the model's output means. Times t
are the model's own: 0 to 999 for diffusion, 0 to 1 or 1,000 for flow matching.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from hyperalign.families.unet import LAST_TIMESTEP

TRAIN_STEPS = 1000


def trailing_timesteps(steps: int, train_steps: int = TRAIN_STEPS) -> list[int]:
    """Returns falling timesteps that start at pure noise: 999, ... for 1,000 training steps."""
    return [round(train_steps - i * train_steps / steps) - 1 for i in range(steps)]


def alphas_cumprod(train_steps: int = TRAIN_STEPS, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Returns Stable Diffusion's alpha-bar for every timestep."""
    betas = torch.linspace(start**0.5, end**0.5, train_steps, dtype=torch.float64).square()
    return (1.0 - betas).cumprod(0).float()


def shifted(u: float, shift: float) -> float:
    """Returns a flow's time moved towards the noise (Esser et al. 2024, eq 23): s u / (1 + (s - 1) u)."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def resolution_shift(tokens: int) -> float:
    """Returns FLUX.1's shift for a number of image tokens: e^mu, mu from 0.5 at 256 to 1.15 at 4,096."""
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


class Process(Protocol):
    """A noise process and a parametrisation of the model's output."""

    @property
    def last_time(self) -> float:
        """The model's time at pure noise."""
        ...

    def times(self, steps: int) -> list[float]:
        """Returns the falling times of a deterministic sampler, the first being pure noise."""
        ...

    def at(self, u_B: Tensor) -> Tensor:
        """Returns the model's times nearest to normalised times u in [0, 1]."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Returns x_t = a(t) x0 + s(t) noise."""
        ...

    def predictions(self, x_t: Tensor, output: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the one-step prediction x0-hat and the noise that belongs to it."""
        ...

    def target(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Returns what the model's output should be."""
        ...

    def weight(self, t_B: Tensor, snr_cap: float) -> Tensor:
        """Returns the weights (B,) of the denoising loss, 1 where `snr_cap` is infinite."""
        ...


def _like(values_B: Tensor, x: Tensor) -> Tensor:
    return values_B.to(x).view(-1, *[1] * (x.ndim - 1))


class Diffusion:
    """Variance-preserving diffusion with Stable Diffusion's schedule (Ho et al. 2020)."""

    def __init__(self, prediction: Literal["epsilon", "v_prediction"] = "epsilon") -> None:
        self.prediction = prediction
        self.last_time = LAST_TIMESTEP
        self._alpha_bar = alphas_cumprod()

    def times(self, steps: int) -> list[float]:
        """Returns trailing timesteps."""
        return [float(t) for t in trailing_timesteps(steps)]

    def at(self, u_B: Tensor) -> Tensor:
        """Returns whole timesteps."""
        return (u_B * self.last_time).round()

    def add_noise(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Returns x_t = sqrt(abar) x0 + sqrt(1 - abar) noise."""
        abar = self._abar(t_B, x0)
        return abar.sqrt() * x0 + (1.0 - abar).sqrt() * noise

    def predictions(self, x_t: Tensor, output: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x0-hat (Eq 4) and the noise."""
        abar = self._abar(t_B, x_t)
        if self.prediction == "epsilon":
            return (x_t - (1.0 - abar).sqrt() * output) / abar.sqrt(), output
        return (
            abar.sqrt() * x_t - (1.0 - abar).sqrt() * output,
            (1.0 - abar).sqrt() * x_t + abar.sqrt() * output,
        )

    def target(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Returns the noise, or v = sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans and Ho 2022)."""
        if self.prediction == "epsilon":
            return noise
        abar = self._abar(t_B, x0)
        return abar.sqrt() * noise - (1.0 - abar).sqrt() * x0

    def weight(self, t_B: Tensor, snr_cap: float) -> Tensor:
        """Returns min(snr, cap) / snr, or / (snr + 1) for v (Hang et al. 2023, arXiv 2303.09556)."""
        abar = self._alpha_bar.to(t_B.device)[t_B.long()]
        snr = abar / (1.0 - abar)
        if self.prediction == "epsilon":
            return snr.clamp(max=snr_cap) / snr
        return torch.ones_like(snr) if math.isinf(snr_cap) else snr.clamp(max=snr_cap) / (snr + 1.0)

    def _abar(self, t_B: Tensor, x: Tensor) -> Tensor:
        return _like(self._alpha_bar.to(x.device)[t_B.to(x.device).long()], x)


class Flow:
    """Rectified flow: x_t = (1 - u) x0 + u noise, the model predicts v = noise - x0 (Eq 12 to 16)."""

    def __init__(self, last_time: float, shift: float) -> None:
        """`last_time` is what the model is told at u = 1; `shift` moves the sampler's times."""
        self.last_time = last_time
        self.shift = shift

    def times(self, steps: int) -> list[float]:
        """Returns evenly spread times, shifted towards the noise."""
        return [self.last_time * shifted(1.0 - i / steps, self.shift) for i in range(steps)]

    def at(self, u_B: Tensor) -> Tensor:
        """Returns u in the model's unit."""
        return u_B * self.last_time

    def add_noise(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Returns x_t = (1 - u) x0 + u noise."""
        u = self._u(t_B, x0)
        return (1.0 - u) * x0 + u * noise

    def predictions(self, x_t: Tensor, output: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x0-hat = x_t - u v and the noise x_t + (1 - u) v."""
        u = self._u(t_B, x_t)
        return x_t - u * output, x_t + (1.0 - u) * output

    def target(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Returns the velocity noise - x0."""
        return noise - x0

    def weight(self, t_B: Tensor, snr_cap: float) -> Tensor:
        """Returns 1: the velocity's error is bounded at every time."""
        return torch.ones_like(t_B, dtype=torch.float32)

    def _u(self, t_B: Tensor, x: Tensor) -> Tensor:
        return _like(t_B / self.last_time, x)
