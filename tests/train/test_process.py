"""Noise processes: x0-hat undoes the noise, targets are what an ideal model predicts, times fall."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.noise import DiffusionSchedule, FlowSchedule, NoiseSchedule, resolution_shift

PROCESSES: dict[str, NoiseSchedule] = {
    "eps": DiffusionSchedule(),
    "v": DiffusionSchedule("v_prediction"),
    "flux": FlowSchedule(1.0, resolution_shift(4096)),
    "sd3": FlowSchedule(1000.0, 3.0),
}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 2, 4, 4, 4, generator=generator, dtype=torch.float64).unbind()
    return x0, noise


@each_process
@given(u=st.floats(0.01, 0.99), seed=st.integers(0, 2**31 - 1))
def test_an_ideal_output_gives_back_image_and_noise(process: NoiseSchedule, u: float, seed: int) -> None:
    x0, noise = pair(seed)
    t_B = process.nearest(torch.tensor([u, u], dtype=torch.float64))
    x_t = process.add_noise(x0, noise, t_B)
    found_x0, found_noise = process.predictions(x_t, process.target(x0, noise, t_B), t_B)
    torch.testing.assert_close(found_x0, x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_noise, noise, atol=1e-5, rtol=1e-5)


@each_process
@given(steps=st.integers(1, 60))
def test_times_fall_from_pure_noise(process: NoiseSchedule, steps: int) -> None:
    times = process.timesteps(steps)
    assert times[0] == process.last_timestep
    assert len(times) == steps
    assert all(later < earlier for earlier, later in itertools.pairwise(times))
    assert times[-1] >= 0


@each_process
def test_without_a_cap_every_time_weighs_the_same(process: NoiseSchedule) -> None:
    t_B = process.nearest(torch.linspace(0.02, 0.98, 9))
    torch.testing.assert_close(process.loss_weight(t_B, float("inf")), torch.ones(9))


def test_flux_shifts_its_times_as_diffusers_does() -> None:
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    steps = 12
    mu = calculate_shift(4096, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    ours = torch.tensor(PROCESSES["flux"].timesteps(steps))
    torch.testing.assert_close(ours, scheduler.sigmas[:-1].float(), atol=1e-6, rtol=1e-6)


def test_sd3_shifts_its_times_as_diffusers_does() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    ours = torch.tensor(PROCESSES["sd3"].timesteps(4))
    torch.testing.assert_close(ours, scheduler.timesteps.float(), atol=1e-3, rtol=1e-5)
