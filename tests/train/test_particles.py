"""Sequential Monte Carlo against a Gaussian, whose posterior and evidence are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from train.generation.particles import (
    Particles,
    Predicted,
    effective_number,
    offspring,
    particle_run,
    tempering,
)
from train.noise import DiffusionSchedule, FlowSchedule, NoiseSchedule
from train.transitions import Gaussian, coefficients, ddim

MEAN, VARIANCE = 0.4, 0.25
STEPS = 20
SCHEDULES = [DiffusionSchedule(), FlowSchedule(1000.0, 1.0)]
Reward = Callable[[Tensor], Tensor]


def prediction(schedule: NoiseSchedule, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Returns the exact x0-hat and eps-hat of images N(MEAN, VARIANCE)."""
    alpha, sigma = coefficients(schedule, t)
    gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    x0 = MEAN + gain * (x - alpha * MEAN)
    return x0, (x - alpha * x0) / sigma


def sampled(schedule: NoiseSchedule, reward: Reward, count: int, seed: int = 0) -> Particles:
    """Runs particles towards p(x0) exp(reward)."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = schedule.timesteps(STEPS)

    def predict(x: Tensor, index: int) -> Predicted:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            x0, eps = prediction(schedule, leaf, timesteps[index])
            found = reward(x0[:, 0])
            (gradient,) = torch.autograd.grad(found.sum(), leaf)
        if index + 1 == STEPS:  # the last step ends at x0-hat
            return Predicted(Gaussian(x0.detach(), 0.0), found.detach(), gradient)
        step = ddim(1.0)(schedule, x, x0.detach(), eps.detach(), timesteps[index], timesteps[index + 1])
        return Predicted(step, found.detach(), gradient)

    x = torch.randn(count, 1, generator=generator)
    return particle_run(x, STEPS, predict, lambda x: reward(x[:, 0]), generator, np.random.default_rng(seed))


def chain(schedule: NoiseSchedule) -> tuple[float, float]:
    """Returns mean and variance of what the sampler itself ends with."""
    timesteps = schedule.timesteps(STEPS)
    mean, variance = 0.0, 1.0
    for index, t in enumerate(timesteps):
        points = torch.tensor([[0.0], [1.0]])
        x0, eps = prediction(schedule, points, t)
        if index + 1 == STEPS:
            at, std = x0, 0.0
        else:
            at, std = ddim(1.0)(schedule, points, x0, eps, t, timesteps[index + 1])
        slope = float(at[1] - at[0])
        mean, variance = float(at[0]) + slope * mean, slope**2 * variance + std**2
    return mean, variance


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["diffusion", "flow"])
def test_a_quadratic_reward_gives_the_known_posterior_and_evidence(schedule: NoiseSchedule) -> None:
    target, width = 1.2, 0.3
    found = sampled(schedule, lambda x: -0.5 * (x - target).square() / width, 20_000)
    m, v = chain(schedule)
    precision = 1 / v + 1 / width
    mean, variance = (m / v + target / width) / precision, 1 / precision
    weights = found.log_weights_K.exp()
    own = float((weights * found.x[:, 0]).sum())
    assert own == pytest.approx(mean, abs=0.02)
    assert float((weights * (found.x[:, 0] - own).square()).sum()) == pytest.approx(variance, rel=0.08)
    evidence = 0.5 * math.log(width / (width + v)) - 0.5 * (m - target) ** 2 / (width + v)
    assert found.log_evidence == pytest.approx(evidence, abs=0.03)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["diffusion", "flow"])
def test_a_linear_reward_shifts_the_mean_by_the_variance(schedule: NoiseSchedule) -> None:
    slope = 1.5
    found = sampled(schedule, lambda x: slope * x, 20_000)
    m, v = chain(schedule)
    weights = found.log_weights_K.exp()
    assert float((weights * found.x[:, 0]).sum()) == pytest.approx(m + slope * v, abs=0.02)
    assert found.log_evidence == pytest.approx(slope * m + 0.5 * slope**2 * v, abs=0.03)


def test_the_evidence_of_few_particles_is_right_on_average() -> None:
    """What resampling forgets to carry along, such as a gradient, shows here first."""
    schedule, target, width = SCHEDULES[0], 1.2, 0.3
    m, v = chain(schedule)
    evidence = math.sqrt(width / (width + v)) * math.exp(-0.5 * (m - target) ** 2 / (width + v))
    runs = [
        math.exp(sampled(schedule, lambda x: -0.5 * (x - target).square() / width, 4, seed).log_evidence)
        for seed in range(400)
    ]
    error = np.std(runs) / math.sqrt(len(runs))
    assert np.mean(runs) == pytest.approx(evidence, abs=4 * error)
    assert error < 0.1 * evidence


def test_without_a_reward_particles_are_plain_samples() -> None:
    found = sampled(SCHEDULES[0], lambda x: 0.0 * x, 4000)
    m, v = chain(SCHEDULES[0])
    assert found.log_evidence == pytest.approx(0.0, abs=1e-4)
    assert float(found.x.mean()) == pytest.approx(m, abs=0.03)
    assert float(found.x.var()) == pytest.approx(v, rel=0.1)
    torch.testing.assert_close(found.log_weights_K.exp(), torch.full((4000,), 1 / 4000), rtol=1e-3, atol=0)


@given(
    st.lists(st.floats(0.0, 5.0), min_size=2, max_size=8).filter(lambda found: sum(found) > 0.1),
    st.integers(0, 99),
)
def test_a_particle_has_its_expected_copies_rounded_down_or_up(weights: list[float], seed: int) -> None:
    normal = np.array(weights) / sum(weights)
    places = offspring(normal, np.random.default_rng(seed))
    assert len(places) == len(weights)
    copies = np.bincount(places, minlength=len(weights))
    assert np.all(copies >= np.floor(len(weights) * normal - 1e-9))
    assert np.all(copies <= np.ceil(len(weights) * normal + 1e-9))


def test_copies_are_those_expected_on_average() -> None:
    weights, rng = np.array([0.35, 0.05, 0.4, 0.2]), np.random.default_rng(0)
    copies = np.mean([np.bincount(offspring(weights, rng), minlength=4) for _ in range(4000)], axis=0)
    np.testing.assert_allclose(copies, 4 * weights, atol=0.04)


def test_the_effective_number_is_one_for_one_weight_and_all_for_equal_ones() -> None:
    assert effective_number(torch.tensor([0.0, -1e9])) == pytest.approx(1.0)
    assert effective_number(torch.full((5,), -math.log(5))) == pytest.approx(5.0)


@given(st.integers(2, 200))
def test_the_reward_comes_in_from_nothing_to_all_of_it(steps: int) -> None:
    shares = tempering(steps)
    assert len(shares) == steps + 1
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert shares == sorted(shares)


def test_the_best_particle_is_the_heaviest() -> None:
    found = Particles(torch.zeros(3, 1), torch.tensor([-2.0, -0.2, -2.0]), torch.tensor([9.0, 1.0, 0.0]), 0.0)
    assert found.best() == 1
    equal = found._replace(log_weights_K=torch.full((3,), -1.1))
    assert equal.best() == 0
