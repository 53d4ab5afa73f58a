"""The curve that key timesteps are found on: whose predictions it compares, and where its points lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hyperalign.schedule import Schedule, find_key_times
from train import relative_distance
from train.config import ModelConfig, ObjectiveConfig, TrainConfig
from train.data.streams import PromptList
from train.inputs import RunInputs
from train.noise import FlowSchedule
from train.objective import Rewards
from train.randomness import StepRandomness, normal
from train.relative_distance import (
    BATCH,
    base_key_times,
    curve_timesteps,
    distance_curve,
    measuring_batch,
    weight_schedule,
)
from train.rollout import rollout


def inputs_of(base: Any) -> RunInputs:
    prompts = PromptList([f"prompt {number}" for number in range(60)])
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


def test_by_default_48_prompts_take_25_steps_16_at_once(
    small_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def curve(_: RunInputs, **options: Any) -> list[float]:
        asked.append(options)
        return [0.0] * 11 + [1.0] + [0.0] * 12

    monkeypatch.setattr(relative_distance, "distance_curve", curve)
    inputs = inputs_of(small_base)
    found = base_key_times(inputs, count=1, guidance_scale=1.5)
    assert asked == [{"prompts": 48, "steps": 25, "guidance_scale": 1.5, "batch": 16}]
    assert found == find_key_times(curve(inputs), curve_timesteps(inputs, 25), 1)


# When they are measured


class Process:
    """One process of a run, as an accelerator shows it."""

    def __init__(self, is_main: bool) -> None:
        self.is_main_process = is_main


MAIN, OTHER = Process(True), Process(False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Returns what a measurement is asked for; it finds 0.75 and 0.25, while the main process sends 0.5."""
    asked: list[dict[str, Any]] = []

    def measure(_: Any, **options: Any) -> tuple[float, ...]:
        asked.append(options)
        return 0.75, 0.25

    monkeypatch.setattr(relative_distance, "base_key_times", measure)
    monkeypatch.setattr(relative_distance, "broadcast_object_list", lambda found: [found[0] or (0.5,)])
    monkeypatch.setattr(relative_distance, "uses_fsdp", lambda _: False)
    return asked


def schedule_of(
    small_base: Any, process: Any, saved: Sequence[float] | None = None, **model: Any
) -> Schedule:
    config = TrainConfig(
        model=ModelConfig(**model), objective=ObjectiveConfig(guidance_scale=2.5, micro_batch=3)
    )
    return weight_schedule(config, inputs_of(small_base), process, saved)


@pytest.mark.parametrize("variant", ["S", "I"])
def test_variants_without_key_times_measure_none(small_base: Any, asked: list[Any], variant: str) -> None:
    assert schedule_of(small_base, MAIN, variant=variant) == Schedule(variant)
    assert schedule_of(small_base, MAIN, [0.3], variant=variant) == Schedule(variant)
    assert asked == []


def test_key_times_of_the_recipe_or_of_a_checkpoint_are_not_measured(
    small_base: Any, asked: list[Any]
) -> None:
    assert schedule_of(small_base, MAIN, [0.3], variant="P", key_times=(0.6,)) == Schedule("P", (0.6,))
    assert schedule_of(small_base, MAIN, [0.3, 0.2], variant="P") == Schedule("P", (0.3, 0.2))
    assert asked == []


def test_the_main_process_measures_the_key_times_that_are_left_open(
    small_base: Any, asked: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="hyperalign.train"):
        found = schedule_of(small_base, MAIN, variant="P", key_count=4)
    assert found == Schedule("P", (0.75, 0.25))
    assert asked == [{"count": 4, "guidance_scale": 2.5, "batch": 3}]
    assert caplog.messages == ["key times of the base model: 0.750, 0.250"]


def test_another_process_receives_them_and_measures_only_with_a_sharded_backbone(
    small_base: Any, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert schedule_of(small_base, OTHER, variant="P") == Schedule("P", (0.5,))
    assert asked == []
    monkeypatch.setattr(relative_distance, "uses_fsdp", lambda process: process is OTHER)
    schedule_of(small_base, OTHER, variant="P")
    assert len(asked) == 1
