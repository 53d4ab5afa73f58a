"""One step of a sampler as a Gaussian: x_s given x_t has a mean and a standard deviation.

Every schedule is x_t = alpha(t) x0 + sigma(t) eps, so one formula serves diffusion and flows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train.noise import FlowSchedule, NoiseSchedule

SMALLEST_STD = 1e-4
"""Below it a step is as good as deterministic, and its density says nothing."""


class Gaussian(NamedTuple):
    """x_s given x_t."""

    mean: Tensor
    std: float

    def sample(self, noise: Tensor) -> Tensor:
        """Returns mean + std noise."""
        return self.mean + self.std * noise

    def log_density(self, x: Tensor) -> Tensor:
        """Returns the log-density (B,) of x, as its mean over the dimensions.

        The mean, not the sum, is what Flow-GRPO, DanceGRPO and SPO clip: a ratio per dimension.
        """
        z = (x - self.mean) / self.std
        return (-0.5 * z.square() - math.log(self.std) - 0.5 * math.log(2.0 * math.pi)).flatten(1).mean(dim=1)


Transition = Callable[[NoiseSchedule, Tensor, Tensor, Tensor, float, float], Gaussian]
"""Schedule, x_t, x0-hat, eps-hat, t and the next timestep s -> x_s."""


def coefficients(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    """Returns alpha(t) and sigma(t)."""
    one, zero, t_B = (
        torch.ones(1, 1, dtype=torch.float64),
        torch.zeros(1, 1, dtype=torch.float64),
        torch.tensor([t]),
    )
    return float(schedule.add_noise(one, zero, t_B)), float(schedule.add_noise(zero, one, t_B))


def ddim(eta: float) -> Transition:
    """Returns DDIM's step with noise eta (Song et al. 2021, eq 12 and 16): 0 is deterministic, 1 is DDPM's.

    var = eta^2 sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)
    mean = alpha_s x0-hat + sqrt(sigma_s^2 - var) eps-hat
    """

    def step(schedule: NoiseSchedule, x: Tensor, x0: Tensor, eps: Tensor, t: float, s: float) -> Gaussian:
        del x
        (alpha_t, sigma_t), (alpha_s, sigma_s) = coefficients(schedule, t), coefficients(schedule, s)
        ratio = alpha_t * sigma_s / (alpha_s * sigma_t)
        variance = eta**2 * sigma_s**2 * (1.0 - ratio**2)
        mean = alpha_s * x0 + math.sqrt(max(0.0, sigma_s**2 - variance)) * eps
        return Gaussian(mean, math.sqrt(max(0.0, variance)))

    return step


def flow_sde(noise_level: Callable[[float, float], float]) -> Transition:
    """Returns the Euler-Maruyama step of a flow's SDE (DanceGRPO, Xue et al. 2025, eq 7; Flow-GRPO, eq 9).

    With g = noise_level(u, next u) and dt = u_s - u_t < 0:
    mean = x_t + dt (v + g^2 / 2 eps-hat / u_t), std = g sqrt(-dt).
    """

    def step(schedule: NoiseSchedule, x: Tensor, x0: Tensor, eps: Tensor, t: float, s: float) -> Gaussian:
        u_t, u_s = schedule.sigma(t), schedule.sigma(s)
        g, dt = noise_level(u_t, u_s), u_s - u_t
        mean = x + dt * ((eps - x0) + 0.5 * g**2 / u_t * eps)
        return Gaussian(mean, g * math.sqrt(-dt))

    return step


def stochastic(schedule: NoiseSchedule, eta: float) -> Transition:
    """Returns DDIM's step with noise eta, for a flow its SDE's with that constant noise level (DanceGRPO)."""

    def constant(u: float, u_next: float) -> float:
        return eta

    return flow_sde(constant) if isinstance(schedule, FlowSchedule) else ddim(eta)


def renoised(schedule: NoiseSchedule, x_s: Tensor, s: float, t: float, noise: Tensor) -> Tensor:
    """Returns x_s, noised back to t: x_t = c x_s + sqrt(sigma_t^2 - c^2 sigma_s^2) noise.

    c = alpha_t / alpha_s (Lugmayr et al. 2022, RePaint; the time travel of FreeDoM and DyMO).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = coefficients(schedule, t), coefficients(schedule, s)
    c = alpha_t / alpha_s
    return c * x_s + math.sqrt(max(0.0, sigma_t**2 - (c * sigma_s) ** 2)) * noise
