"""One step of the trainer on the small base: its gradient, its optimiser, its average and its metrics."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hyperalign import checkpoint
from hyperalign.errors import HyperAlignError
from train.methods.hyperalign import preference_pass
from train.objective import NoisedImages, noised_states, preference_loss, reward_loss, rollout_states
from train.randomness import StepRandomness, normal, sample_u
from train.rollout import rollout

Taken = list[Tensor]


def watched(run: Any) -> Taken:
    """Returns a list that gets the gradient of each step that the optimiser takes, flat."""
    taken: Taken = []
    step = run.optimiser.step

    def then(*given: Any) -> None:
        taken.append(torch.cat([p.grad.flatten() for p in run.network.parameters()]))
        step(*given)

    run.optimiser.step = then
    return taken


def fitted(run: Any) -> tuple[Taken, list[dict[str, Any]]]:
    """Trains to the end; returns the gradients and the metrics."""
    taken, rows = watched(run), list[dict[str, Any]]()
    run.fit(rows.append)
    return taken, rows


def weights(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() <= 1e-3 * expected.norm(), (found - expected).norm() / expected.norm()


def gradient(loss: Tensor, run: Any) -> Tensor:
    parameters = list(run.network.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def images_by_hand(
    run: Any, place: int, count: int, bounds: Any, purpose: int, drop: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    o, base = run.config.objective, run.base
    rng = StepRandomness(run.config.run.seed, run.step).generator(purpose)
    x0, captions = run.inputs.preference.batch(place, count, rng, slice(0, count))
    chances = rng.random(count) if drop else np.ones(count)
    u_B = sample_u(count, bounds, o.timestep_sampling, rng)
    noise, other = normal((count, *x0.shape[1:]), rng), normal((count, *x0.shape[1:]), rng)
    kept = ["" if chance < drop else text for chance, text in zip(chances, captions, strict=True)]
    return x0, noise, other, base.noise_schedule.nearest(u_B), kept


def rollout_by_hand(run: Any) -> Tensor:
    """Returns the gradient of L_R from a rollout."""
    o, base = run.config.objective, run.base
    rng = StepRandomness(run.config.run.seed, run.step).generator(1)
    prompts = run.inputs.prompts.sample(o.prompt_batch, rng)
    noise = normal((o.prompt_batch, *base.latent_shape), rng)
    picks = sorted(rng.choice(range(o.skip_first, o.rollout_steps), o.timesteps, replace=False))
    cond, uncond = base.conditions(prompts), base.conditions([""] * o.prompt_batch)
    path = rollout(
        base,
        run.adapter,
        run.schedule,
        cond,
        uncond,
        noise,
        steps=o.rollout_steps,
        guidance_scale=o.guidance_scale,
    )
    return reward_by_hand(run, rollout_states(path, picks, cond, uncond, prompts))


def noised_by_hand(run: Any, place: int) -> Tensor:
    """Returns the gradient of L_R from noised images."""
    o, base = run.config.objective, run.base
    count = o.prompt_batch * o.timesteps
    x0, noise, other, t_B, captions = images_by_hand(run, place, count, o.reward_range, purpose=3)
    cond, uncond = base.conditions(captions), base.conditions([""] * count)
    states = noised_states(base, run.schedule, NoisedImages(x0, noise, other, t_B, captions), cond, uncond)
    return reward_by_hand(run, states)


def reward_by_hand(run: Any, states: Any) -> Tensor:
    o, rewards = run.config.objective, run.inputs.rewards
    given: dict[str, Any] = {"guidance_scale": o.guidance_scale, "cap": o.reward_cap}
    given |= {"weighting": o.reward_weighting}
    loss, _ = reward_loss(
        run.adapter, run.base, rewards, states, conditional_only=o.conditional_only, **given
    )
    return gradient(loss, run)


def preference_by_hand(run: Any, place: int = 0) -> tuple[Tensor, Tensor]:
    """Returns L_G and its gradient."""
    o, base = run.config.objective, run.base
    x0, noise, other, t_B, captions = images_by_hand(
        run, place, o.preference_batch, o.preference_range, purpose=2, drop=o.caption_dropout
    )
    texts = base.conditions(captions)
    states = noised_states(base, run.schedule, NoisedImages(x0, noise, other, t_B, captions), texts, None)
    loss = preference_loss(run.adapter, base, x0, noise, states, o.snr_gamma)
    return loss.detach(), gradient(loss, run)


# The gradient


@pytest.mark.parametrize(
    "objective",
    [
        {}, {"reward_weighting": "signal"},
        {"reward_cap": 1e3}, {"conditional_only": True}, {"snr_gamma": 0.5}, {"guidance_scale": 5.0},
        {"caption_dropout": 0.5}, {"timestep_sampling": "logit_normal", "preference_range": (0.2, 0.4)},
        {"skip_first": 2, "timesteps": 1, "prompt_batch": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_steps_gradient_is_the_weighted_sum_of_both_losses_gradients(
    small_run: Callable[..., Any], objective: dict[str, Any]
) -> None:
    run = small_run(objective=objective)
    reward, (loss, preference) = rollout_by_hand(run), preference_by_hand(run)
    assert reward.norm() > 1e-4
    assert preference.norm() > 1e-3
    (taken,), (row,) = fitted(run)
    close(taken, 0.5 * reward + 3.0 * preference)
    if run.config.objective.reward_weighting == "none":
        cap = objective.get("reward_cap", 0.0)
        assert row["reward_loss"] == pytest.approx(cap - row["reward"], rel=1e-4)
    assert row["preference_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm_reward"] == pytest.approx(0.5 * reward.norm().item(), rel=1e-3)
    assert row["grad_norm_preference"] == pytest.approx(3.0 * preference.norm().item(), rel=1e-3)
    assert row["grad_norm"] == pytest.approx(taken.norm().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["reward_weight", "preference_weight"])
def test_a_loss_without_weight_is_not_computed(small_run: Callable[..., Any], name: str) -> None:
    run = small_run(objective={name: 0.0})
    expected = 0.5 * rollout_by_hand(run) if name == "preference_weight" else 3 * preference_by_hand(run)[1]
    run.inputs.preference.places.clear()
    (taken,), (row,) = fitted(run)
    close(taken, expected)
    rewarded = {"reward", "reward_loss", "tiny reward", "grad_norm_reward"}
    learned = {"preference_loss", "grad_norm_preference"}
    present, absent = (rewarded, learned) if name == "preference_weight" else (learned, rewarded)
    assert present <= row.keys()
    assert not absent & row.keys()
    assert len(run.inputs.preference.places) == (name == "reward_weight")
    expected_images = 4 if name == "preference_weight" else 3
    assert row["images_per_second"] * row["seconds"] == pytest.approx(expected_images)
    names = [source.name for source in checkpoint.load(run.path).header.sources]
    assert ("tiny preference reward" in names) is (name == "preference_weight")


@pytest.mark.parametrize("state", ["noised", "mixed"])
def test_the_reward_may_start_from_noised_images(small_run: Callable[..., Any], state: str) -> None:
    run = small_run(objective={"state": state, "timesteps": 1}, optim={"steps": 2, "lr": 1e-4})
    noised_first = state == "noised"
    places = iter([0, 2, 5, 7] if noised_first else [0, 3, 5])
    expected: list[Tensor] = []

    def by_hand(row: Any = None) -> None:
        if run.step < 2:
            noised = noised_first or run.step == 1
            reward = noised_by_hand(run, next(places)) if noised else rollout_by_hand(run)
            expected.append(0.5 * reward + 3.0 * preference_by_hand(run, next(places))[1])

    by_hand()
    taken = watched(run)
    run.fit(by_hand)
    for found, gradient_by_hand in zip(taken, expected, strict=True):
        close(found, gradient_by_hand)
    assert run.images_seen == (2 * 5 if noised_first else 2 * 3 + 2)


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("state", ["rollout", "noised"])
def test_small_backward_passes_add_up_to_the_whole_batch(
    small_run: Callable[..., Any], tmp_path: Path, state: str, micro_batch: int
) -> None:
    def step(name: str, size: int) -> tuple[Tensor, dict[str, Any]]:
        objective = {"micro_batch": size, "preference_batch": 4, "state": state}
        (taken,), (row,) = fitted(small_run(tmp_path / name, objective=objective))
        return taken, row

    (whole, figures), (parts, others) = step("whole", 0), step("parts", micro_batch)
    close(parts, whole)
    for name in ("reward", "reward_loss", "tiny reward", "preference_loss", "grad_norm", "grad_norm_reward"):
        assert others[name] == pytest.approx(figures[name], rel=1e-3), name


def test_no_backward_pass_takes_more_samples_than_the_limit(small_run: Callable[..., Any]) -> None:
    seen: list[int] = []

    def counting(images: Tensor, prompts: Any) -> Tensor:
        seen.append(len(images))
        return images.mean(dim=(1, 2, 3))

    small_run(reward=counting, objective={"micro_batch": 3}).fit()
    assert seen == [3, 1]


def test_no_caption_is_dropped_where_nothing_samples_with_the_empty_prompt(
    small_run: Callable[..., Any], make_base: Callable[..., Any]
) -> None:
    base, captions = make_base(everywhere=False), list[str]()
    conditions, base.cfg = base.conditions, False
    base.conditions = lambda prompts: captions.extend(prompts) or conditions(prompts)
    run = small_run(base=base, objective={"caption_dropout": 0.9})
    captions.clear()
    preference_pass(run._new_step())
    assert captions == ["image 0", "image 1", "image 2"]


def test_backward_passes_are_halved_once(small_run: Callable[..., Any]) -> None:
    run = small_run(objective={"micro_batch": 8, "preference_batch": 8})
    assert run._halve_micro_batch()
    assert run._micro_batch == 4
    assert not run._halve_micro_batch()
    assert run._micro_batch == 4
    assert not small_run(objective={"micro_batch": 1})._halve_micro_batch()


def test_without_preference_images_a_run_that_needs_them_says_so(small_run: Callable[..., Any]) -> None:
    run = small_run()
    run.inputs = dataclasses.replace(run.inputs, preference=None)
    with pytest.raises(HyperAlignError, match="needs preference images; set data.preference"):
        run.fit()


# The optimiser


def test_the_gradient_is_clipped_and_its_norm_is_logged_as_it_was(small_run: Callable[..., Any]) -> None:
    (taken,), (row,) = fitted(small_run(optim={"max_grad_norm": 1e-3}))
    assert taken.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert row["grad_norm"] > 0.01


def test_adamw_with_warm_up_and_cosine_by_hand(small_run: Callable[..., Any]) -> None:
    run = small_run(optim={"steps": 5, "warmup_steps": 2, "lr": 0.01, "weight_decay": 0.1})
    taken, rates = watched(run), list[float]()
    states = [weights(run.network)]

    def note(_row: Any) -> None:
        rates.append(run.optimiser.param_groups[0]["lr"])
        states.append(weights(run.network))

    run.fit(note)
    cosine = [0.01 * (1 + math.cos(math.pi * done / 3)) / 2 for done in range(3)]
    assert rates == pytest.approx([0.005, 0.01, *cosine])
    first, second = torch.zeros_like(states[0]), torch.zeros_like(states[0])
    for index, (rate, g) in enumerate(zip(rates, taken, strict=True)):
        first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g.square()
        scaled = (first / (1 - 0.9 ** (index + 1))) / ((second / (1 - 0.99 ** (index + 1))).sqrt() + 1e-8)
        moved = states[index] * (1 - rate * 0.1) - rate * scaled
        torch.testing.assert_close(states[index + 1], moved, atol=1e-5, rtol=1e-4)


def test_the_average_follows_quickly_at_first_and_by_its_decay_later(small_run: Callable[..., Any]) -> None:
    run = small_run(optim={"steps": 4, "ema_decay": 0.2})
    average = weights(run.average)
    assert not any(p.requires_grad for p in run.average.parameters())
    decays = iter([1 / 10, 2 / 11, 0.2, 0.2])

    def follow(_row: Any) -> None:
        nonlocal average
        decay = next(decays)
        average = decay * average + (1 - decay) * weights(run.network)
        torch.testing.assert_close(weights(run.average), average, atol=1e-6, rtol=1e-5)
        assert not any(p.requires_grad for p in run.average.parameters())

    run.fit(follow)
    assert run.averaged().network is run.average
    assert run.averaged().header is run.hyperalign.header


def test_a_steps_gradient_does_not_add_to_the_last_ones(small_run: Callable[..., Any]) -> None:
    run = small_run(optim={"steps": 2, "lr": 1e-9, "weight_decay": 0.0})
    taken, _ = fitted(run)
    run.step = 1
    close(taken[1], 0.5 * rollout_by_hand(run) + 3.0 * preference_by_hand(run, 3)[1])
    assert all(p.grad is None for p in run.network.parameters())


# What is not finite


def bad_at(*steps: int) -> tuple[Any, list[Any]]:
    """Returns a reward that is not finite in these steps of the trainer that is put into the list."""
    holder: list[Any] = []

    def score(images: Tensor, prompts: Any) -> Tensor:
        return images.mean(dim=(1, 2, 3)) * (float("nan") if holder[0].step in steps else 1.0)

    return score, holder


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(small_run: Callable[..., Any]) -> None:
    reward, holder = bad_at(1)
    run = small_run(reward=reward, optim={"steps": 3})
    holder.append(run)
    rows: list[dict[str, Any]] = []
    states: list[tuple[Tensor, Tensor, float]] = []

    def note(row: Any) -> None:
        rows.append(row)
        moments = next(iter(run.optimiser.state.values()))
        states.append((weights(run.network), weights(run.average), float(moments["step"])))

    taken = watched(run)
    run.fit(note)
    assert [row["skipped"] for row in rows] == [False, True, False]
    assert [row["skipped_in_all"] for row in rows] == [0, 1, 1]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert math.isnan(rows[1]["grad_norm"])
    assert len(taken) == 2
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*states[:2], strict=True))
    assert not torch.equal(states[1][0], states[2][0])
    assert run.images_seen == 9
    assert (run.skipped, run.step) == (1, 3)


def test_a_finite_step_starts_the_count_anew(small_run: Callable[..., Any]) -> None:
    reward, holder = bad_at(0, 2, 4)
    run = small_run(reward=reward, optim={"steps": 5, "bad_steps": 2})
    holder.append(run)
    run.fit()
    assert run.skipped == 3


@pytest.mark.parametrize("bad_steps", [1, 2, 3])
def test_a_run_that_stays_infinite_ends_before_it_counts_the_last_step(
    small_run: Callable[..., Any], tmp_path: Path, bad_steps: int
) -> None:
    reward, holder = bad_at(1, 2, 3, 4)
    run = small_run(reward=reward, optim={"steps": 6, "bad_steps": bad_steps})
    holder.append(run)
    message = f"not finite for {bad_steps} steps in a row, up to step {bad_steps}. Lower optim.lr"
    with pytest.raises(HyperAlignError, match=message):
        run.fit()
    (path,) = (tmp_path / "checkpoints").iterdir()
    saved = torch.load(path)
    assert saved["step"] == bad_steps
    assert saved["skipped"] == bad_steps - 1
    assert saved["images_seen"] == 3 * bad_steps


# The metrics


def test_the_metrics_of_a_step_and_its_line_in_the_log(small_run: Callable[..., Any], tmp_path: Path) -> None:
    run = small_run(optim={"steps": 2})
    _, rows = fitted(run)
    assert set(rows[0]) == {
        "step", "reward", "reward_loss", "tiny reward", "grad_norm_reward", "preference_loss", "grad_norm",
            "grad_norm_preference",
        "skipped", "skipped_in_all", "not_finite", "seconds", "images_per_second", "seconds_left",
    }  # fmt: skip
    for row in rows:
        assert row["images_per_second"] * row["seconds"] == pytest.approx(2 * 2 + 3)
        assert 0 < row["seconds"] < 60
        assert row["reward"] == pytest.approx(2.0 * row["tiny reward"])
        assert row["reward_loss"] == pytest.approx(-row["reward"])
    assert rows[0]["seconds_left"] is None
    assert rows[1]["seconds_left"] == 0
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == [0, 1]
    assert written[0].keys() == rows[0].keys()
    assert written[1]["reward"] == pytest.approx(rows[1]["reward"], abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "bf16", "expected"),
    [
        (torch.float32, True, True), (torch.float32, False, False), (torch.bfloat16, True, False),
    ],
)  # fmt: skip
def test_frozen_models_run_in_bfloat16_where_asked_and_where_they_are_not_so_already(
    small_run: Callable[..., Any], make_base: Callable[..., Any], dtype: Any, bf16: bool, expected: bool
) -> None:
    base, seen = make_base(everywhere=False), set[bool]()
    base.backbone.to(dtype)
    call = base.call

    def noted(*given: Any) -> Any:
        seen.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16)
        return call(*given)

    base.call = noted
    small_run(base=base, optim={"bf16": bf16}).fit()
    assert seen == {expected}
