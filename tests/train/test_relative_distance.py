"""The curve that key timesteps are found on: whose predictions it compares, and where its points lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperalign.schedule import Schedule, find_key_times
from train.inputs import PromptList, RunInputs
from train.noise import FlowSchedule
from train.objective import Rewards
from train.randomness import StepRandomness, normal
from train.relative_distance import BATCH, base_key_times, curve_timesteps, distance_curve, measuring_batch
from train.rollout import rollout


class Counting(PromptList):
    """Notes how many prompts are asked for."""

    asked: list[int] = []  # noqa: RUF012

    def sample(self, count: int, rng: Any) -> list[str]:
        self.asked.append(count)
        return PromptList.sample(self, count, rng)


def inputs_of(base: Any) -> RunInputs:
    prompts = Counting([f"prompt {number}" for number in range(60)])
    prompts.asked.clear()
    return RunInputs(base, base, prompts, None, Rewards({}, {}), lambda *_: {}, {})


def relative(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The distance of two images whose channels have mean 0 and deviation 1."""
    flat = [(x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-5) for x in (now, before)]
    return (flat[0] - flat[1]).flatten(1).norm(dim=1) / flat[1].flatten(1).norm(dim=1)


def curve_by_hand(
    base: Any, inputs: RunInputs, prompts: int, steps: int, guidance_scale: float, seed: int
) -> Any:
    """Returns the curve of all prompts at once."""
    rng = StepRandomness(seed, 0).generator(1)
    chosen = inputs.prompts.sample(prompts, rng)
    noise = normal((prompts, *base.latent_shape), rng)
    cond, uncond = base.conditions(chosen), base.conditions([""] * prompts)
    path = rollout(base, None, Schedule("I"), cond, uncond, noise, steps=steps, guidance_scale=guidance_scale)
    x0 = path.predictions
    return [float(relative(x0[i], x0[i - 1]).mean()) for i in range(1, steps)]


@pytest.mark.parametrize("batch", [1, 2, 3, 16])
def test_the_curve_is_the_mean_distance_of_each_prediction_to_the_one_before(
    small_base: Any, batch: int
) -> None:
    inputs = inputs_of(small_base)
    options: dict[str, Any] = {"prompts": 3, "steps": 4, "guidance_scale": 3.0}
    found = distance_curve(inputs, batch=batch, seed=2, **options)
    assert found == pytest.approx(curve_by_hand(small_base, inputs, seed=2, **options), rel=1e-3)


def test_the_search_has_a_seed_of_its_own(small_base: Any) -> None:
    inputs = inputs_of(small_base)
    options: dict[str, Any] = {"prompts": 1, "steps": 3, "guidance_scale": 3.0}
    found = distance_curve(inputs, **options)
    assert found == pytest.approx(curve_by_hand(small_base, inputs, seed=5, **options), rel=1e-3)


def test_no_more_prompts_than_the_batch_are_sampled_at_once(small_base: Any) -> None:
    samples: list[int] = []

    class Watching(type(small_base)):
        def call(self, x_BCHW: Any, t_B: Any, conditions: Any) -> Any:
            samples.append(len(x_BCHW) // 2)
            return super().call(x_BCHW, t_B, conditions)

    base = Watching(small_base.noise_schedule)
    distance_curve(inputs_of(base), prompts=17, steps=2, guidance_scale=1.0)
    assert samples == [16, 16, 1, 1]


def test_a_curves_points_lie_at_the_later_of_two_timesteps(small_base: Any, make_base: Any) -> None:
    assert curve_timesteps(inputs_of(small_base), 4) == [749 / 999, 499 / 999, 249 / 999]
    flow = make_base(FlowSchedule(1000.0, 1.0))
    assert curve_timesteps(inputs_of(flow), 4) == [0.75, 0.5, 0.25]


def test_the_search_keeps_to_the_limit_of_a_backward_pass() -> None:
    assert BATCH == 16
    assert [measuring_batch(limit) for limit in (0, 1, 15, 16, 17)] == [16, 1, 15, 16, 16]


def test_key_times_are_found_on_the_curve(small_base: Any) -> None:
    inputs = inputs_of(small_base)
    options: dict[str, Any] = {"prompts": 2, "steps": 8, "guidance_scale": 3.0}
    found = base_key_times(inputs, count=2, batch=2, **options)
    curve = distance_curve(inputs, batch=2, **options)
    assert found == find_key_times(curve, curve_timesteps(inputs, 8), 2)
    assert len(found) == 2


def test_by_default_48_prompts_take_25_steps(small_base: Any) -> None:
    timesteps: list[float] = []

    class Watching(type(small_base)):
        def call(self, x_BCHW: Any, t_B: Any, conditions: Any) -> Any:
            timesteps.append(float(t_B[0]))
            return super().call(x_BCHW, t_B, conditions)

    base = Watching(small_base.noise_schedule)
    inputs = inputs_of(base)
    base_key_times(inputs, count=1, guidance_scale=1.0)
    assert inputs.prompts.asked == [48]
    assert timesteps == 3 * base.noise_schedule.timesteps(25)
