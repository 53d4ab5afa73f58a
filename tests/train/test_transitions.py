"""Stochastic steps: their noise adds up to the schedule's, and without noise they are the sampler's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from train.noise import DiffusionSchedule, FlowSchedule, NoiseSchedule
from train.transitions import Gaussian, coefficients, ddim, flow_sde, renoised

SCHEDULES: list[NoiseSchedule] = [DiffusionSchedule(), FlowSchedule(1000.0, 3.0)]
fractions = st.floats(0.05, 0.95)


def pair(schedule: NoiseSchedule, one: float, other: float) -> tuple[float, float]:
    """Returns two timesteps of a schedule, the noisier first."""
    t, s = (float(schedule.nearest(torch.tensor(u))) for u in (max(one, other), min(one, other)))
    return t, s


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["diffusion", "flow"])
@given(one=fractions, other=fractions)
def test_without_noise_a_step_is_that_of_the_sampler(
    schedule: NoiseSchedule, one: float, other: float
) -> None:
    t, s = pair(schedule, one, other)
    x0, eps = batch()
    x = schedule.add_noise(x0, eps, torch.full((2,), t))
    found = ddim(0.0)(schedule, x, x0, eps, t, s)
    assert found.std == 0.0
    torch.testing.assert_close(
        found.mean, schedule.add_noise(x0, eps, torch.full((2,), s)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["diffusion", "flow"])
@given(one=fractions, other=fractions, eta=st.floats(0.0, 1.0))
def test_the_noise_of_a_step_adds_up_to_that_of_its_timestep(
    schedule: NoiseSchedule, one: float, other: float, eta: float
) -> None:
    t, s = pair(schedule, one, other)
    found = ddim(eta)(schedule, torch.zeros(1), torch.zeros(1), torch.ones(1), t, s)
    _, sigma_s = coefficients(schedule, s)
    assert float(found.mean) ** 2 + found.std**2 == pytest.approx(sigma_s**2, rel=1e-5)


def test_ddims_noise_is_that_of_the_papers_formula() -> None:
    schedule, t, s = DiffusionSchedule(), 700.0, 600.0
    a_t, a_s = (float(schedule.signal(torch.tensor([u]))) for u in (t, s))
    expected = math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    zero = torch.zeros(1)
    assert ddim(1.0)(schedule, zero, zero, zero, t, s).std == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7])
def test_a_flows_sde_keeps_the_marginals_of_a_gaussian(level: float) -> None:
    """Images N(0.5, 0.2^2): the exact x0-hat is known, and many small steps end at their distribution."""
    schedule, mean, std = FlowSchedule(1.0, 1.0), 0.5, 0.2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator)
    step, steps = flow_sde(lambda u, _: level * math.sqrt(u)), 400
    for index in range(steps - 1):
        t, s = 1.0 - index / steps, 1.0 - (index + 1) / steps
        gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        x0 = mean + gain * (x - (1 - t) * mean)
        found = step(schedule, x, x0, (x - (1 - t) * x0) / t, t, s)
        x = found.sample(torch.randn(x.shape, generator=generator))
    assert float(x.mean()) == pytest.approx(mean, abs=0.01)
    assert float(x.std()) == pytest.approx(std, abs=0.01)


def test_without_noise_a_flows_sde_is_eulers_step() -> None:
    schedule = FlowSchedule(1000.0, 3.0)
    x0, eps = batch()
    x = schedule.add_noise(x0, eps, torch.full((2,), 800.0))
    found = flow_sde(lambda u, s: 0.0)(schedule, x, x0, eps, 800.0, 700.0)
    torch.testing.assert_close(found.mean, x - 0.1 * (eps - x0), atol=1e-5, rtol=1e-5)


@given(std=st.floats(0.05, 3.0))
def test_a_log_density_is_the_mean_of_torchs(std: float) -> None:
    mean, x = batch()
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(dim=1)
    torch.testing.assert_close(Gaussian(mean, std).log_density(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["diffusion", "flow"])
@given(one=fractions, other=fractions)
def test_noise_that_leads_back_gives_the_variance_of_the_noisier_step(
    schedule: NoiseSchedule, one: float, other: float
) -> None:
    t, s = pair(schedule, one, other)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = coefficients(schedule, t), coefficients(schedule, s)
    zero, unit = torch.zeros(1), torch.ones(1)
    of_image = float(renoised(schedule, alpha_s * unit, s, t, zero))
    of_noise = (
        float(renoised(schedule, sigma_s * unit, s, t, zero)),
        float(renoised(schedule, zero, s, t, unit)),
    )
    assert of_image == pytest.approx(alpha_t, rel=1e-5)
    assert math.hypot(*of_noise) == pytest.approx(sigma_t, rel=1e-5)
