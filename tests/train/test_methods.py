"""Every training method: its loss against a few lines of its own, and its steps in a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from first_updates import close, first_update, gradient, moved
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import of_method, trainer
from torch import Tensor

from train.methods import dance_grpo, srpo
from train.methods.alignprop import steps_with_gradient
from train.methods.dpo import dpo_loss, margins_of
from train.methods.grpo import clipped_loss, group_advantages
from train.methods.kto import kto_loss
from train.methods.mix_grpo import window
from train.methods.settings import AlignPropConfig, GrpoConfig, KtoConfig, MethodName
from train.methods.table import METHODS
from train.objective import NoisedImages
from train.processes import gradient_of
from train.randomness import StepRandomness, normal, sample_u
from train.trainer import Trainer

numbers = st.floats(-2.0, 2.0)


def test_every_name_has_a_method() -> None:
    assert set(METHODS) == set(get_args(MethodName))


# Losses against their papers' formulas, in a few lines


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=5), st.floats(0.1, 5.0))
def test_dpo_is_minus_log_sigmoid_of_the_errors_differences(rows: list[Any], beta: float) -> None:
    own_w, ref_w, own_l, ref_l = (torch.tensor(column) for column in zip(*rows, strict=True))
    margin_B = margins_of(torch.cat([own_w, own_l]), torch.cat([ref_w, ref_l]))
    expected = [
        -math.log(1 / (1 + math.exp(beta / 2 * ((won - won_ref) - (lost - lost_ref)))))
        for won, won_ref, lost, lost_ref in rows
    ]
    assert float(dpo_loss(margin_B, beta)) == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-6)


@given(st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=6), numbers)
def test_kto_is_one_minus_the_utility(rows: list[Any], point: float) -> None:
    config = KtoConfig(beta=3.0, desirable_weight=2.0, undesirable_weight=0.5)
    gains, desirable = zip(*rows, strict=True)
    expected = [
        (2.0 if good else 0.5) * (1 - 1 / (1 + math.exp(-(1 if good else -1) * 3.0 * (gain - point))))
        for gain, good in rows
    ]
    found = kto_loss(torch.tensor(gains), torch.tensor(desirable), torch.tensor(point), config)
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-6)


@given(st.lists(st.floats(-3.0, 3.0), min_size=8, max_size=8))
def test_advantages_are_standardised_within_their_group(rewards: list[float]) -> None:
    found = group_advantages(torch.tensor(rewards), 4, clip=5.0).view(2, 4).numpy()
    for group, own in zip(np.array(rewards, dtype=np.float32).reshape(2, 4), found, strict=True):
        expected = np.clip((group - group.mean()) / (group.std(ddof=1) + 1e-8), -5, 5)
        if group.std() > 1e-3:
            np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-3)


def test_equal_rewards_have_no_advantage_and_a_broken_image_neither() -> None:
    assert torch.equal(group_advantages(torch.full((4,), 0.3), 4, clip=5.0), torch.zeros(4))
    found = group_advantages(torch.tensor([1.0, math.nan, 3.0, 2.0]), 4, clip=5.0)
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0, 0.0]))


@given(st.lists(st.tuples(st.floats(0.5, 1.5), numbers), min_size=1, max_size=5))
def test_the_policy_loss_is_clipped_where_that_makes_it_larger(rows: list[Any]) -> None:
    expected = [max(-a * r, -a * min(max(r, 0.8), 1.2)) for r, a in rows]
    ratio, advantage = (torch.tensor(column) for column in zip(*rows, strict=True))
    assert float(clipped_loss(ratio, advantage, 0.2)) == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-5)


@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 500), st.integers(1, 5))
def test_a_window_has_its_width_moves_and_begins_again(
    steps: int, width: int, number: int, stride: int
) -> None:
    config = GrpoConfig(window=width, window_interval=3, window_stride=stride)
    found = window(config, steps, number)
    assert len(found) == min(width, steps)
    assert 0 <= found.start
    assert found.stop <= steps
    assert window(config, steps, 0).start == 0
    places = steps - len(found) + 1
    assert window(config, steps, number + 3).start == (found.start + stride) % places


@given(st.integers(2, 50), st.integers(0, 60), st.integers(0, 1000))
def test_alignprop_never_trains_the_first_step_and_draft_trains_the_last_k(
    steps: int, last: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    assert 1 <= steps_with_gradient(AlignPropConfig(), steps, rng) < steps
    if last:
        assert steps_with_gradient(AlignPropConfig(last_steps=last), steps, rng) == min(last, steps)


# The gradient of a step, by hand


def pairs_by_hand(run: Trainer, purpose: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    o, rng = run.config.objective, StepRandomness(run.config.run.seed, run.step).generator(purpose)
    count = o.preference_batch
    x0, rejected, captions = run.inputs.pairs.pairs(0, count, rng, slice(None))  # type: ignore[union-attr]
    chances = rng.random(count)
    u_B = sample_u(count, o.preference_range, o.timestep_sampling, rng)
    noise = normal(tuple(x0.shape), rng)
    kept = [
        "" if chance < o.caption_dropout else text for chance, text in zip(chances, captions, strict=True)
    ]
    return x0, rejected, noise, run.base.noise_schedule.at_position(u_B), kept


def error_by_hand(
    run: Trainer, x0: Tensor, noise: Tensor, t_B: Tensor, captions: list[str], adapted: bool
) -> Tensor:
    base = run.base
    call = base.call(
        base.noise_schedule.add_noise(x0, noise, t_B), t_B, run.inputs.encoder.conditions(captions)
    )
    output = run.adapter.generate_and_forward(call)[0] if adapted else base.backbone(**call)[0]
    return (output - noise).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_dpos_gradient_is_that_of_its_equation(tmp_path: Path, micro_batch: int) -> None:
    run = moved(trainer(of_method("dpo", tmp_path, micro_batch=micro_batch)))
    x_w, x_l, noise, t_B, captions = pairs_by_hand(run, purpose=5)
    m = {
        (name, adapted): error_by_hand(run, x, noise, t_B, captions, adapted)
        for name, x in (("w", x_w), ("l", x_l)) for adapted in (True, False)
    }  # fmt: skip
    better = (m["w", False] - m["w", True]) - (m["l", False] - m["l", True])
    loss = -torch.log(torch.sigmoid(25.0 * better)).mean()
    metrics, found = first_update(run)
    close(found, gradient(loss, run))
    assert float(metrics["preference_loss"]) == pytest.approx(loss.item(), rel=1e-4)
    assert float(metrics["pairs_right"]) == float((better > 0).float().mean())


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_ktos_gradient_is_that_of_its_equation(tmp_path: Path, micro_batch: int) -> None:
    run = moved(trainer(of_method("kto", tmp_path, micro_batch=micro_batch)))
    x_w, x_l, noise, t_B, captions = pairs_by_hand(run, purpose=6)
    good = StepRandomness(run.config.run.seed, run.step).generator(7).random(len(x_w)) < 0.8
    x = torch.where(torch.from_numpy(good)[:, None, None, None], x_w, x_l)
    g = error_by_hand(run, x, noise, t_B, captions, False) - error_by_hand(run, x, noise, t_B, captions, True)
    z0 = max(0.0, float(g.mean()))
    y = torch.tensor([1.0 if is_good else -1.0 for is_good in good])
    loss = (1 - torch.sigmoid(y * 50.0 * (g - z0))).mean()
    metrics, found = first_update(run)
    close(found, gradient(loss, run))
    assert float(metrics["preference_loss"]) == pytest.approx(loss.item(), rel=1e-4)
    assert float(metrics["reference_point"]) == pytest.approx(z0, abs=1e-6)


@pytest.mark.parametrize("variant", ["S", "I"])
@pytest.mark.parametrize(("last", "eta"), [(1, 0.0), (2, 1.0), (4, 0.0)])
def test_alignprops_gradient_is_that_of_plain_backpropagation(
    tmp_path: Path, variant: str, last: int, eta: float
) -> None:
    config = of_method("alignprop", tmp_path, variant, micro_batch=1)
    config = dataclasses.replace(config, alignprop=AlignPropConfig(last_steps=last, eta=eta))
    run = moved(trainer(config))
    o, base, rng = config.objective, run.base, StepRandomness(config.run.seed, 0).generator(4)
    prompts = run.inputs.prompts.sample(2, rng)
    x = normal((2, *base.latent_shape), rng)
    noises = [normal((2, *base.latent_shape), rng) for _ in range(3)]
    texts = {key: torch.cat([value, run.inputs.encoder.conditions([""] * 2)[key]])
             for key, value in run.inputs.encoder.conditions(prompts).items()}  # fmt: skip
    timesteps, cores = base.noise_schedule.timesteps(4), None
    for index, t in enumerate(timesteps):
        with torch.set_grad_enabled(index >= 4 - last or variant == "I"):
            x = x if index > 4 - last else x.detach()
            call = base.call(torch.cat([x, x]), torch.full((4,), t), texts)
            if variant == "S" or cores is None:
                detached = call | {"sample": call["sample"].detach()}
                cores = run.network(run.adapter.perceive(detached))
            cond, uncond = run.adapter.forward(call, cores).chunk(2)
            eps = uncond + o.guidance_scale * (cond - uncond)
            a = base.noise_schedule.signal(torch.tensor([t]))
            x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
            if index < 3:
                b = base.noise_schedule.signal(torch.tensor([timesteps[index + 1]]))
                variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
                x = b.sqrt() * x0 + (1 - b - variance).sqrt() * eps + variance.sqrt() * noises[index]
    loss = -run.inputs.rewards(base.decode(x0), prompts)[0].mean()
    metrics, found = first_update(run)
    close(found, gradient(loss, run))
    assert float(metrics["reward_loss"]) == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("method", ["dance_grpo", "mix_grpo"])
def test_a_groups_first_update_is_the_policy_gradient(tmp_path: Path, method: MethodName) -> None:
    """At ratio 1 the gradient is that of -A log p, whose mean over dimensions is a weighted squared error."""
    run = moved(trainer(of_method(method, tmp_path, micro_batch=3)))
    updates = run._updates()
    first = next(updates)
    found = gradient_of(run.network.parameters())
    assert float(first["ratio_from_1"]) < 1e-4
    assert float(first["clipped"]) == 0.0
    run._apply_gradient(first)
    second = next(updates)
    assert float(second["ratio_from_1"]) > 0.0
    assert next(updates, None) is None
    close(found, policy_gradient_by_hand(trainer(run.config), method))


def policy_gradient_by_hand(run: Trainer, method: str) -> Tensor:
    moved(run)
    base, schedule, o = run.base, run.base.noise_schedule, run.config.objective
    rng = StepRandomness(run.config.run.seed, 0).generator(8)
    prompts = [prompt for prompt in run.inputs.prompts.sample(2, rng) for _ in range(4)]
    x = normal((2, *base.latent_shape), rng).repeat_interleave(4, dim=0)
    noises = [normal((8, *base.latent_shape), rng) for _ in range(3)]
    texts = {key: torch.cat([value, run.inputs.encoder.conditions([""] * 8)[key]])
             for key, value in run.inputs.encoder.conditions(prompts).items()}  # fmt: skip
    timesteps, densities = schedule.timesteps(4), list[Tensor]()
    for index, t in enumerate(timesteps):
        call = base.call(torch.cat([x, x]), torch.full((16,), t), texts)
        cond, uncond = run.adapter.generate_and_forward(call)[0].chunk(2)
        eps = uncond + o.guidance_scale * (cond - uncond)
        a = schedule.signal(torch.tensor([t]))
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        if index == 3:
            break
        b = schedule.signal(torch.tensor([timesteps[index + 1]]))
        stochastic = method == "dance_grpo" or index < 2
        std = ((1 - b) / (1 - a) * (1 - a / b)).sqrt() * stochastic
        mean = b.sqrt() * x0 + (1 - b - std**2).sqrt() * eps
        x = (mean + std * noises[index]).detach()
        if stochastic:
            normal_density = torch.distributions.Normal(mean, std.expand_as(mean))
            densities.append(normal_density.log_prob(x).mean(dim=(1, 2, 3)))
    reward = run.inputs.rewards(base.decode(x0.detach()), prompts)[0].view(2, 4)
    advantage = ((reward - reward.mean(dim=1, keepdim=True)) / reward.std(dim=1, keepdim=True)).flatten()
    trained = [0, 2, 4, 6]  # every second sample, of both groups, in the first of two updates
    loss = -torch.stack([(advantage * density)[trained] for density in densities]).mean()
    return gradient(loss, run)


# SRPO


def test_with_the_true_noise_direct_align_gives_the_image_back_from_any_position(tmp_path: Path) -> None:
    run = trainer(of_method("srpo", tmp_path, guidance_scale=1.0))
    step, generator = run._new_step(), torch.Generator().manual_seed(0)
    z, eps = (torch.randn(3, *run.base.latent_shape, generator=generator) for _ in range(2))
    prompts = ["a red heart", "two dogs", "a dog"]
    cond = run.inputs.encoder.conditions(prompts)
    run.base.prediction = lambda output, x: eps  # type: ignore[method-assign]
    down, up = srpo.directions(step, torch.tensor([0.0, 0.4, 1.0]))
    assert (down.start_B > down.end_B).tolist() == [True, True, False]
    assert (up.end_B > up.start_B).tolist() == [False, True, True]
    assert torch.equal(down.end_B, up.end_B)
    for direction in (down, up):
        images = NoisedImages(z, eps, eps, direction.start_B, prompts)
        found = srpo.recovered(step, images, cond, None, direction.end_B)
        torch.testing.assert_close(found, z, atol=2e-4, rtol=2e-4)


def test_a_models_error_is_scaled_down_and_reversed_in_the_other_direction(tmp_path: Path) -> None:
    run = trainer(of_method("srpo", tmp_path, guidance_scale=1.0))
    step, generator = run._new_step(), torch.Generator().manual_seed(0)
    z, eps, wrong = (torch.randn(1, *run.base.latent_shape, generator=generator) for _ in range(3))
    cond, sigma = run.inputs.encoder.conditions(["a red heart"]), run.base.noise_schedule.sigma
    run.base.prediction = lambda output, x: eps + wrong  # type: ignore[method-assign]
    for direction in srpo.directions(step, torch.tensor([0.5])):
        images = NoisedImages(z, eps, eps, direction.start_B, ["a red heart"])
        error = srpo.recovered(step, images, cond, None, direction.end_B) - z
        way = sigma(float(direction.end_B)) - sigma(float(direction.start_B))
        torch.testing.assert_close(error, way * wrong, atol=1e-3, rtol=1e-3)


def test_both_directions_prefer_the_positive_wording(tmp_path: Path) -> None:
    run = trainer(of_method("srpo", tmp_path))
    down, up = srpo.directions(run._new_step(), torch.tensor([0.0, 1.0]))
    assert down.positive_B.tolist() == pytest.approx([1.1, 1.25])
    assert up.negative_B.tolist() == pytest.approx([1.3, 1.01])
    assert down.negative_B.tolist() == up.positive_B.tolist() == [-1.0, -1.0]


def test_each_image_has_a_position_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen, directions = (
        trainer(of_method("srpo", tmp_path, prompt_batch=4)),
        list[Tensor](),
        srpo.directions,
    )
    monkeypatch.setattr(
        srpo, "directions", lambda step, position_B: seen.append(position_B) or directions(step, position_B)
    )
    first_update(run)
    assert len(set(seen[0].tolist())) == 4


def test_processes_that_share_a_sharded_model_train_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would make different numbers of passes, in each of which they wait for each other."""
    config = of_method("dance_grpo", tmp_path, prompt_batch=1, rollout_steps=8)
    run = trainer(dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, trained_share=0.5)))
    rolled = SimpleNamespace(prompts=["a red heart"] * config.grpo.group)
    monkeypatch.setattr(dance_grpo, "group_rollout", lambda step, transitions: rolled)
    monkeypatch.setattr(
        dance_grpo, "group_updates", lambda step, found, trained: iter([list(map(trained, range(4)))])
    )
    chosen = {}
    for sharded, index in itertools.product((False, True), range(2)):
        monkeypatch.setattr(dance_grpo, "uses_fsdp", lambda _, sharded=sharded: sharded)
        process: Any = SimpleNamespace(num_processes=2, process_index=index)
        step = dataclasses.replace(run._new_step(), accelerator=process)
        chosen[sharded, index] = next(dance_grpo.dance_grpo(step))
    assert chosen[True, 0] == chosen[True, 1] == chosen[False, 0] != chosen[False, 1]
