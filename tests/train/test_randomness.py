"""Random numbers of a step: decided by seed, step and purpose, the same whole batch for all processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.randomness import StepRandomness, normal, sample_u


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_seed_step_and_purpose_decide_the_numbers() -> None:
    found = StepRandomness(3, 7).generator(2).integers(2**40, size=4)
    assert found.tolist() == np.random.default_rng((3, 7, 0, 2)).integers(2**40, size=4).tolist()
    others = (
        StepRandomness(4, 7).generator(2),
        StepRandomness(3, 8).generator(2),
        StepRandomness(3, 7).generator(1),
    )
    assert len({int(source.integers(2**40)) for source in others} | {int(found[0])}) == 4
    several = StepRandomness(3, 7).generator(2, 5).integers(2**40)
    assert several == np.random.default_rng((3, 7, 0, 2, 5)).integers(2**40)


def test_every_process_generates_the_whole_batch_and_takes_its_samples() -> None:
    alone, first, second = StepRandomness(1, 2), StepRandomness(1, 2, 0, 2), StepRandomness(1, 2, 1, 2)
    assert (alone.process, alone.processes) == (0, 1)
    assert alone.part(3) == first.part(3) == slice(0, 3)
    assert second.part(3) == slice(3, 6)
    assert StepRandomness(1, 2, 2, 3).part(4) == slice(8, 12)
    numbers = [randomness.generator(1).integers(2**40) for randomness in (alone, first, second)]
    assert numbers[0] == numbers[1] == numbers[2]


def test_the_randomness_of_a_step_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        StepRandomness(1, 2).step = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_noise_is_standard_normal_and_decided_by_the_source() -> None:
    noise = normal((100, 4, 16, 16), rng())
    generator = torch.Generator().manual_seed(int(rng().integers(2**62)))
    assert torch.equal(noise, torch.randn(100, 4, 16, 16, generator=generator))
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)


def test_uniform_u_are_whole_timesteps_from_bound_to_bound() -> None:
    u = sample_u(500, (0.0, 2 / 999), "uniform", rng())
    assert u.dtype == torch.float32
    assert (u * 999).round().unique().tolist() == [0.0, 1.0, 2.0]
    u = sample_u(20_000, (0.2, 0.9), "uniform", rng())
    whole = (u * 999).round()
    torch.testing.assert_close(u, whole / 999)
    assert (whole.min().item(), whole.max().item()) == (200.0, 899.0)
    assert u.mean().item() == pytest.approx(0.55, abs=0.01)
    steps = rng().integers(200, 900, size=20_000)
    assert whole.tolist() == steps.tolist()


def test_logit_normal_u_are_a_sigmoid_of_normal_numbers_spread_over_the_bounds() -> None:
    u = sample_u(1000, (0.25, 0.75), "logit_normal", rng())
    x = torch.from_numpy(rng().standard_normal(1000))
    torch.testing.assert_close(u, (0.25 + 0.5 * x.sigmoid()).float())
    assert u.dtype == torch.float32
    assert sample_u(3, (0.0, 1.0), "logit_normal", rng()).shape == (3,)
