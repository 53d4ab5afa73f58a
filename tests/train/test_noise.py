"""Noise schedules: x0-hat undoes the noise, targets are what an ideal model predicts, timesteps fall."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.noise import (
    DiffusionSchedule,
    FlowSchedule,
    NoiseSchedule,
    alphas_cumprod,
    implied_noise,
    resolution_shift,
    shifted,
    trailing_timesteps,
)

NOISE_SCHEDULES: dict[str, NoiseSchedule] = {
    "eps": DiffusionSchedule(),
    "v": DiffusionSchedule("v_prediction"),
    "flux": FlowSchedule(1.0, resolution_shift(4096)),
    "sd3": FlowSchedule(1000.0, 3.0),
}
each_noise_schedule = pytest.mark.parametrize("noise_schedule", NOISE_SCHEDULES.values(), ids=NOISE_SCHEDULES)


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 2, 4, 4, 4, generator=generator, dtype=torch.float64).unbind()
    return x0, noise


@each_noise_schedule
@given(u=st.floats(0.01, 0.99), seed=st.integers(0, 2**31 - 1))
def test_an_ideal_output_gives_back_image_and_noise(
    noise_schedule: NoiseSchedule, u: float, seed: int
) -> None:
    x0, noise = pair(seed)
    t_B = noise_schedule.nearest(torch.tensor([u, u], dtype=torch.float64))
    x_t = noise_schedule.add_noise(x0, noise, t_B)
    found_x0, found_noise = noise_schedule.predictions(x_t, noise_schedule.target(x0, noise, t_B), t_B)
    torch.testing.assert_close(found_x0, x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_noise, noise, atol=1e-5, rtol=1e-5)


@each_noise_schedule
@given(u=st.floats(0.01, 0.99), seed=st.integers(0, 2**31 - 1))
def test_the_noise_of_a_mixture_follows_from_its_image(
    noise_schedule: NoiseSchedule, u: float, seed: int
) -> None:
    x0, noise = pair(seed)
    t_B = noise_schedule.nearest(torch.tensor([u, u], dtype=torch.float64))
    x_t = noise_schedule.add_noise(x0, noise, t_B)
    torch.testing.assert_close(implied_noise(noise_schedule, x_t, x0, t_B), noise, atol=1e-5, rtol=1e-5)


def test_noise_levels_are_those_of_samplers() -> None:
    """ComfyUI's sigmas: sqrt((1 - abar) / abar) of a diffusion model, at most 14.6, and u of a flow."""
    diffusion = DiffusionSchedule()
    assert diffusion.sigma(999.0) == pytest.approx(14.6146, abs=1e-3)
    assert diffusion.sigma(0.0) == pytest.approx(0.0292, abs=1e-4)
    assert FlowSchedule(1000.0, 3.0).sigma(250.0) == 0.25


@each_noise_schedule
@given(steps=st.integers(1, 60))
def test_timesteps_fall_from_pure_noise(noise_schedule: NoiseSchedule, steps: int) -> None:
    timesteps = noise_schedule.timesteps(steps)
    assert timesteps[0] == noise_schedule.last_timestep
    assert len(timesteps) == steps
    assert all(later < earlier for earlier, later in itertools.pairwise(timesteps))
    assert timesteps[-1] >= 0


@each_noise_schedule
def test_with_an_infinite_gamma_every_timestep_weighs_the_same(noise_schedule: NoiseSchedule) -> None:
    t_B = noise_schedule.nearest(torch.linspace(0.02, 0.98, 9))
    torch.testing.assert_close(noise_schedule.loss_weight(t_B, float("inf")), torch.ones(9))


def test_flux_shifts_its_timesteps_as_diffusers_does() -> None:
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    steps = 12
    mu = calculate_shift(4096, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    ours = torch.tensor(NOISE_SCHEDULES["flux"].timesteps(steps))
    torch.testing.assert_close(ours, scheduler.sigmas[:-1].float(), atol=1e-6, rtol=1e-6)


def test_sd3_shifts_its_timesteps_as_diffusers_does() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    ours = torch.tensor(NOISE_SCHEDULES["sd3"].timesteps(4))
    torch.testing.assert_close(ours, scheduler.timesteps.float(), atol=1e-3, rtol=1e-5)


def alpha_bar(t: int) -> float:
    """Stable Diffusion's, by multiplication."""
    root, last = math.sqrt(0.00085), math.sqrt(0.012)
    return math.prod(1 - (root + (last - root) * i / 999) ** 2 for i in range(t + 1))


def column(*values: float) -> torch.Tensor:
    """Returns images (B, 1, 1, 1) of one number each."""
    return torch.tensor(values).view(-1, 1, 1, 1)


T_B = torch.tensor([0.0, 500.0, 999.0])
ABAR_B = [alpha_bar(0), alpha_bar(500), alpha_bar(999)]


def test_trailing_timesteps_by_hand() -> None:
    assert trailing_timesteps(1) == [999]
    assert trailing_timesteps(3) == [999, 666, 332]
    assert trailing_timesteps(4) == [999, 749, 499, 249]
    assert trailing_timesteps(2, 100) == [99, 49]
    assert DiffusionSchedule().timesteps(4) == [999.0, 749.0, 499.0, 249.0]
    assert all(isinstance(t, float) for t in DiffusionSchedule().timesteps(4))


def test_alpha_bar_is_stable_diffusions() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = alphas_cumprod()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, scheduler.alphas_cumprod, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours[[0, 500, 999]], torch.tensor(ABAR_B))
    torch.testing.assert_close(alphas_cumprod(2, 0.25, 0.04), torch.tensor([0.75, 0.72]))


def test_a_shift_moves_timesteps_towards_the_noise() -> None:
    assert shifted(0.5, 3.0) == 0.75
    assert shifted(0.25, 2.0) == pytest.approx(0.4)
    assert shifted(0.3, 1.0) == 0.3


def test_flux_shifts_by_the_number_of_tokens() -> None:
    shifts = [resolution_shift(tokens) for tokens in (256, 2176, 4096)]
    assert shifts == pytest.approx([math.exp(0.5), math.exp(0.825), math.exp(1.15)])


def test_a_diffusion_predicts_the_noise_unless_told_otherwise() -> None:
    assert DiffusionSchedule().prediction == "epsilon"
    assert DiffusionSchedule("v_prediction").prediction == "v_prediction"


def test_diffusion_timesteps_are_whole() -> None:
    assert DiffusionSchedule().last_timestep == 999.0
    assert DiffusionSchedule().nearest(torch.tensor([0.0, 0.25, 0.5004, 1.0])).tolist() == [
        0.0,
        250.0,
        500.0,
        999.0,
    ]


@pytest.mark.parametrize("t_B", [T_B, T_B.long()], ids=["float", "long"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_diffusion_mixes_by_the_square_roots_of_alpha_bar(prediction: Any, t_B: torch.Tensor) -> None:
    x_t = DiffusionSchedule(prediction).add_noise(column(2.0, 2.0, 2.0), column(-1.0, -1.0, -1.0), t_B)
    expected = [2.0 * math.sqrt(abar) - math.sqrt(1 - abar) for abar in ABAR_B]
    torch.testing.assert_close(x_t, column(*expected), atol=1e-5, rtol=1e-5)


def test_a_predicted_noise_gives_x0_by_hand() -> None:
    x0, noise = DiffusionSchedule().predictions(column(3.0, 3.0, 3.0), column(0.5, 0.5, 0.5), T_B)
    expected = [(3.0 - 0.5 * math.sqrt(1 - abar)) / math.sqrt(abar) for abar in ABAR_B]
    torch.testing.assert_close(x0, column(*expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(noise, column(0.5, 0.5, 0.5))


def test_a_predicted_velocity_gives_x0_and_noise_by_hand() -> None:
    x0, noise = DiffusionSchedule("v_prediction").predictions(
        column(3.0, 3.0, 3.0), column(0.5, 0.5, 0.5), T_B
    )
    expected_x0 = [3.0 * math.sqrt(abar) - 0.5 * math.sqrt(1 - abar) for abar in ABAR_B]
    expected_noise = [3.0 * math.sqrt(1 - abar) + 0.5 * math.sqrt(abar) for abar in ABAR_B]
    torch.testing.assert_close(x0, column(*expected_x0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(noise, column(*expected_noise), atol=1e-5, rtol=1e-5)


def test_a_diffusions_targets_by_hand() -> None:
    x0, noise = column(2.0, 2.0, 2.0), column(-1.0, -1.0, -1.0)
    assert torch.equal(DiffusionSchedule().target(x0, noise, T_B), noise)
    expected = [-math.sqrt(abar) - 2.0 * math.sqrt(1 - abar) for abar in ABAR_B]
    found = DiffusionSchedule("v_prediction").target(x0, noise, T_B)
    torch.testing.assert_close(found, column(*expected), atol=1e-5, rtol=1e-5)


def test_min_snr_weights_by_hand() -> None:
    snr = [abar / (1 - abar) for abar in ABAR_B]
    assert snr[0] > 5.0 > snr[1]
    eps = DiffusionSchedule().loss_weight(T_B, 5.0)
    torch.testing.assert_close(eps, torch.tensor([5.0 / snr[0], 1.0, 1.0]), atol=1e-6, rtol=1e-3)
    v = DiffusionSchedule("v_prediction").loss_weight(T_B, 5.0)
    expected = [5.0 / (snr[0] + 1), snr[1] / (snr[1] + 1), snr[2] / (snr[2] + 1)]
    torch.testing.assert_close(v, torch.tensor(expected), atol=1e-6, rtol=1e-3)


def test_a_flows_timesteps_by_hand() -> None:
    flow = FlowSchedule(1000.0, 3.0)
    assert flow.timesteps(4) == pytest.approx([1000.0, 900.0, 750.0, 500.0])
    assert FlowSchedule(1.0, 1.0).timesteps(4) == [1.0, 0.75, 0.5, 0.25]
    assert flow.nearest(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0.0, 250.0, 1000.0]


@each_noise_schedule
def test_even_positions_of_a_run_are_the_timesteps_that_the_sampler_takes(
    noise_schedule: NoiseSchedule,
) -> None:
    """So the preference loss sees the timesteps of sampling as often as sampling does."""
    positions = torch.tensor([1.0 - i / 8 for i in range(8)])
    found, taken = noise_schedule.at_position(positions), torch.tensor(noise_schedule.timesteps(8))
    # Diffusion's sampler takes whole timesteps, counted from the other end.
    assert float((found - taken).abs().max()) <= 1.1e-3 * noise_schedule.last_timestep
    assert noise_schedule.at_position(torch.zeros(1)).item() == 0.0


@each_noise_schedule
def test_the_signal_is_the_images_share_of_the_variance(noise_schedule: NoiseSchedule) -> None:
    t_B = noise_schedule.nearest(torch.linspace(0.05, 1.0, 9))
    one, none = torch.ones(9, 1, dtype=torch.float64), torch.zeros(9, 1, dtype=torch.float64)
    alpha, sigma = noise_schedule.add_noise(one, none, t_B), noise_schedule.add_noise(none, one, t_B)
    expected = (alpha.square() / (alpha.square() + sigma.square())).squeeze(1).float()
    torch.testing.assert_close(noise_schedule.signal(t_B), expected)


@pytest.mark.parametrize("last_timestep", [1.0, 1000.0])
def test_a_flow_is_a_straight_line_from_image_to_noise(last_timestep: float) -> None:
    flow, t_B = FlowSchedule(last_timestep, 3.0), last_timestep * torch.tensor([0.0, 0.25, 1.0])
    x0, noise = column(2.0, 2.0, 2.0), column(-1.0, -1.0, -1.0)
    velocity = flow.target(x0, noise, t_B)
    torch.testing.assert_close(velocity, column(-3.0, -3.0, -3.0))
    torch.testing.assert_close(flow.add_noise(x0, noise, t_B), column(2.0, 1.25, -1.0))
    found = flow.predictions(column(2.0, 1.25, -1.0), velocity, t_B)
    torch.testing.assert_close(found, (x0, noise))
    wrong = flow.predictions(column(1.0, 1.0, 1.0), column(2.0, 2.0, 2.0), t_B)
    torch.testing.assert_close(wrong, (column(1.0, 0.5, -1.0), column(3.0, 2.5, 1.0)))


@pytest.mark.parametrize("snr_gamma", [0.5, float("inf")])
def test_a_flow_weighs_every_timestep_the_same(snr_gamma: float) -> None:
    weights = FlowSchedule(1000.0, 3.0).loss_weight(torch.tensor([0, 400, 1000]), snr_gamma)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [1.0, 1.0, 1.0]


@each_noise_schedule
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 2), (3, 2, 2, 2)])
def test_a_sample_has_a_timestep_of_its_own_whatever_its_shape(
    noise_schedule: NoiseSchedule, shape: tuple[int, ...]
) -> None:
    t_B = noise_schedule.nearest(torch.tensor([0.1, 0.5, 0.9]))
    samples = noise_schedule.add_noise(torch.ones(shape), torch.zeros(shape), t_B).reshape(3, -1)
    assert torch.equal(samples, samples[:, :1].expand_as(samples))
    assert samples[0, 0] > samples[1, 0] > samples[2, 0]
