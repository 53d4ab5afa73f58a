"""Rollouts: each step against its formula with numbers by hand, and whose weights it used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperalign.schedule import Schedule
from train.noise import DiffusionSchedule, FlowSchedule, NoiseSchedule
from train.rollout import Denoiser, guided, rollout


class Linear(nn.Module):
    """Predicts its condition, plus a tenth of x and, at the last timestep, a half."""

    def __init__(self, last_timestep: float) -> None:
        super().__init__()
        self.last_timestep = last_timestep

    def forward(self, x: Tensor, t_B: Tensor, c_B: Tensor) -> tuple[Tensor, str]:
        per_sample = c_B + 0.5 * t_B / self.last_timestep
        return 0.1 * x + per_sample.view(-1, 1, 1, 1), "what else a backbone returns"


def linear_base(noise_schedule: NoiseSchedule) -> Any:
    """The `Base` protocol around it, with nothing in between; images are one number."""
    return SimpleNamespace(
        noise_schedule=noise_schedule,
        backbone=Linear(noise_schedule.last_timestep),
        call=lambda x, t_B, conditions: {"x": x, "t_B": t_B, "c_B": conditions["c"]},
        prediction=lambda output, x: output,
    )


def pixels(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def conditions(*values: float) -> dict[str, Tensor]:
    return {"c": torch.tensor(values)}


def sampled(
    noise_schedule: NoiseSchedule, cond: Sequence[float], uncond: Sequence[float] | None, **options: Any
) -> Any:
    return rollout(
        linear_base(noise_schedule), None, Schedule("S"), conditions(*cond),
        None if uncond is None else conditions(*uncond), pixels(1.0, -2.0, 0.5)[: len(cond)],
        **({"steps": 2, "guidance_scale": 3.0} | options),
    )  # fmt: skip


def test_guidance_starts_from_the_unconditional_prediction() -> None:
    assert guided(torch.tensor(3.0), torch.tensor(1.0), 4.0).item() == 1.0 + 4.0 * 2.0
    assert guided(torch.tensor(3.0), torch.tensor(1.0), 1.0).item() == 3.0
    assert guided(torch.tensor(3.0), torch.tensor(1.0), 0.0).item() == 1.0


def test_two_euler_steps_by_hand() -> None:
    path = sampled(FlowSchedule(10.0, 1.0), [0.2], None)
    # u = 1: v = 0.1 * 1 + 0.2 + 0.5 = 0.8, x0 = 1 - 0.8, and half a step of v.
    # u = 0.5: v = 0.1 * 0.6 + 0.2 + 0.25 = 0.51, x0 = 0.6 - 0.5 * 0.51.
    assert path.timesteps == [10.0, 5.0]
    torch.testing.assert_close(torch.cat(path.states), pixels(1.0, 0.6))
    torch.testing.assert_close(torch.cat(path.predictions), pixels(0.2, 0.345))
    torch.testing.assert_close(path.final, pixels(0.345))


@pytest.mark.parametrize(
    "schedule", [FlowSchedule(10.0, 1.0), DiffusionSchedule()], ids=["flow", "diffusion"]
)
def test_a_guide_moves_the_predictions_of_its_steps(schedule: NoiseSchedule) -> None:
    times = schedule.timesteps(3)
    plain = sampled(schedule, [0.2, 0.1], [0.4, 0.0], steps=3)

    def follows(denoiser: Denoiser, x: Tensor, index: int) -> Tensor | None:
        return None if index == 0 else denoiser.predictions(x, times[index])[0]

    followed = sampled(schedule, [0.2, 0.1], [0.4, 0.0], steps=3, guide=follows)
    torch.testing.assert_close(followed.final, plain.final, atol=1e-4, rtol=1e-4)
    moved = sampled(schedule, [0.2, 0.1], [0.4, 0.0], steps=3, guide=lambda _, x, index: x + index)
    for index, (x0, x) in enumerate(zip(moved.predictions, moved.states, strict=True)):
        assert torch.equal(x0, x + index)
    torch.testing.assert_close(moved.final, moved.states[2] + 2)


def test_guidance_mixes_conditional_and_unconditional_predictions() -> None:
    path = sampled(FlowSchedule(10.0, 1.0), [0.2, 0.1, 0.0], [0.4, 0.0, 0.0], steps=1, guidance_scale=3.0)
    # Samples 1, -2 and 0.5: v unconditional 1.0, 0.3 and 0.55, conditional 0.8, 0.4 and 0.55.
    expected = pixels(1.0 - (1.0 - 3 * 0.2), -2.0 - (0.3 + 3 * 0.1), 0.5 - 0.55)
    torch.testing.assert_close(path.final, expected)


def test_two_ddim_steps_by_hand() -> None:
    path = sampled(DiffusionSchedule(), [0.2], [0.2])
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    alpha_bar = {t: math.prod(1 - beta for beta in betas[: t + 1]) for t in (999, 499)}
    x = 1.0
    for t, later in ((999, 499), (499, None)):
        eps = 0.1 * x + 0.2 + 0.5 * t / 999
        x0 = (x - math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_bar[t])
        if later is not None:
            x = math.sqrt(alpha_bar[later]) * x0 + math.sqrt(1 - alpha_bar[later]) * eps
    assert path.timesteps == [999.0, 499.0]
    assert path.states[1].item() == pytest.approx(x, rel=1e-4)
    assert path.predictions[1].item() == pytest.approx(x0, rel=1e-4)
    assert path.final.item() == path.predictions[1].item()


def test_without_an_adapter_nothing_is_generated() -> None:
    path = sampled(FlowSchedule(1.0, 1.0), [0.2], None, steps=3)
    assert path.generations == 0


def test_a_rollout_that_stops_early_ends_with_the_state_it_was_to_reach() -> None:
    whole = sampled(FlowSchedule(1.0, 3.0), [0.2], None, steps=4)
    part = sampled(FlowSchedule(1.0, 3.0), [0.2], None, steps=4, until=2)
    assert len(whole.states) == len(whole.predictions) == len(whole.generated_at) == 4
    assert len(part.states) == len(part.generated_at) == 3
    assert len(part.predictions) == 2
    assert part.timesteps == whole.timesteps
    assert all(torch.equal(a, b) for a, b in zip(part.states, whole.states, strict=False))
    assert torch.equal(part.final, whole.states[2])


def test_a_rollout_until_its_first_state_runs_nothing() -> None:
    part = sampled(FlowSchedule(1.0, 1.0), [0.2], None, steps=2, until=0)
    assert part.predictions == []
    assert part.final.item() == 1.0


SCHEDULES = {
    "S": (Schedule("S"), [0, 1, 2, 3]),
    "P": (Schedule("P", (0.6, 0.3)), [0, 0, 2, 3]),
    "P exactly at a key time": (Schedule("P", (0.5,)), [0, 0, 2, 2]),
    "I": (Schedule("I"), [0, 0, 0, 0]),
}


@pytest.mark.parametrize(("schedule", "generated_at"), SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(
    "noise_schedule", [DiffusionSchedule(), FlowSchedule(999.0, 1.0)], ids=["diffusion", "flow"]
)
def test_each_step_uses_the_weights_that_the_schedule_says(
    make_base: Any,
    adapted: Any,
    normal: Any,
    schedule: Schedule,
    generated_at: list[int],
    noise_schedule: NoiseSchedule,
) -> None:
    if isinstance(noise_schedule, DiffusionSchedule) and schedule.key_times == (0.5,):
        schedule = Schedule("P", (499 / 999,))
    base = make_base(noise_schedule)
    adapter = adapted(base, schedule)
    cond, uncond = base.conditions(["a", "b"]), base.conditions(["", "c"])
    path = rollout(base, adapter, schedule, cond, uncond, normal(2), steps=4, guidance_scale=2.0)
    assert path.generated_at == generated_at
    assert path.generations == len(set(generated_at))
    with torch.no_grad():
        for index, generator in enumerate(generated_at):
            x0, noise = by_hand(base, adapter, path, index, generator, cond, uncond)
            torch.testing.assert_close(path.predictions[index], x0, atol=1e-4, rtol=1e-4)
            if index < 3:
                x = base.noise_schedule.add_noise(x0, noise, torch.full((2,), path.timesteps[index + 1]))
                torch.testing.assert_close(path.states[index + 1], x, atol=1e-4, rtol=1e-4)
    assert torch.equal(path.states[0], normal(2))
    assert torch.equal(path.final, path.predictions[3])


def by_hand(
    base: Any,
    adapter: Any,
    path: Any,
    index: int,
    generator: int,
    cond: Any,
    uncond: Any,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns x0-hat and noise of one step, each sample alone, with weights generated at another step."""
    outputs: dict[str, Tensor] = {}
    for name, texts in (("cond", cond), ("uncond", uncond)):
        read = base.call(path.states[generator], torch.full((2,), path.timesteps[generator]), texts)
        call = base.call(path.states[index], torch.full((2,), path.timesteps[index]), texts)
        outputs[name] = adapter.forward(call, adapter.network(adapter.perceive(read)), strength)
    output = outputs["uncond"] + 2.0 * (outputs["cond"] - outputs["uncond"])
    return base.noise_schedule.predictions(
        path.states[index], output, torch.full((2,), path.timesteps[index])
    )


@pytest.mark.parametrize("schedule", [Schedule("S"), Schedule("I")], ids=lambda s: s.variant)
def test_strength_reaches_steps_that_generate_and_steps_that_do_not(
    small_base: Any, adapted: Any, normal: Callable[..., Tensor], schedule: Schedule
) -> None:
    adapter = adapted(small_base, schedule)
    cond, uncond = small_base.conditions(["a", "b"]), small_base.conditions(["", ""])

    def path(adapter: Any, **options: float) -> Any:
        given = (small_base, adapter, schedule, cond, uncond, normal(2))
        return rollout(*given, steps=2, guidance_scale=2.0, **options)

    assert torch.equal(path(adapter).final, path(adapter, strength=1.0).final)
    assert torch.equal(path(adapter, strength=0.0).final, path(None).final)
    assert not torch.equal(path(adapter).final, path(None).final)
    half = path(adapter, strength=0.5)
    for index in (0, 1):
        generator = index if schedule.variant == "S" else 0
        with torch.no_grad():
            x0, _ = by_hand(small_base, adapter, half, index, generator, cond, uncond, 0.5)
        torch.testing.assert_close(half.predictions[index], x0, atol=1e-4, rtol=1e-4)


def test_no_gradient_runs_through_a_rollout(small_base: Any, adapted: Any, normal: Any) -> None:
    adapter, cond = adapted(small_base), small_base.conditions(["a"])
    path = rollout(small_base, adapter, Schedule("S"), cond, cond, normal(1), steps=2, guidance_scale=2.0)
    assert not any(x.requires_grad for x in [*path.states, *path.predictions, path.final])


def test_weights_are_generated_at_a_key_time_that_a_step_hits_exactly(
    make_base: Any, adapted: Any, normal: Any
) -> None:
    """Key times are measured in double precision; single precision would miss half of them by a step."""
    base = make_base(FlowSchedule(999.0, 3.0))
    adapter, cond = adapted(base), base.conditions(["a"])
    for index, t in enumerate(base.noise_schedule.timesteps(9)[1:], start=1):
        schedule = Schedule("P", (t / base.noise_schedule.last_timestep,))
        path = rollout(base, adapter, schedule, cond, None, normal(1), steps=9, guidance_scale=1.0)
        assert path.generated_at == [0] * index + [index] * (9 - index)
