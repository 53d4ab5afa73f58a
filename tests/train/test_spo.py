"""SPO: its loss, its pairs and its updates, against few-line computations."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from first_updates import close, first_update, gradient, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import of_method, trainer
from torch import Tensor

from train.methods import spo
from train.methods.settings import SpoConfig
from train.methods.step import Step
from train.processes import gradient_of
from train.randomness import StepRandomness, normal
from train.rollout import rollout
from train.trainer import Trainer

numbers = st.floats(-2.0, 2.0)
WITHIN = 2e-4
"""A way from the start at which ratios of densities are not clipped yet."""


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5), st.floats(0.1, 20.0))
def test_spo_is_minus_log_sigmoid_of_clipped_log_ratios(rows: list[Any], beta: float) -> None:
    expected = []
    for won, lost in rows:
        rho_w, rho_l = (min(max(math.exp(ratio), 0.9), 1.1) for ratio in (won, lost))
        expected.append(-math.log(1 / (1 + math.exp(-beta * (math.log(rho_w) - math.log(rho_l))))))
    won_B, lost_B = (torch.tensor(column) for column in zip(*rows, strict=True))
    torch.testing.assert_close(
        spo.spo_loss(won_B, lost_B, beta, 0.1), torch.tensor(expected), rtol=1e-4, atol=1e-5
    )


@settings(deadline=None)
@given(st.floats(-4.0, 4.0), st.floats(-4.0, 4.0), st.floats(0.0, 0.99))
def test_the_threshold_is_one_of_probabilities(best: float, worst: float, threshold: float) -> None:
    first, second = torch.softmax(torch.tensor([best, worst], dtype=torch.float64), 0).tolist()
    if abs(first - second - threshold) > 1e-6:
        assert (best - worst > SpoConfig(threshold=threshold).least_gap) == (first - second > threshold)


def test_spo_begins_at_log_2(tmp_path: Path) -> None:
    metrics, found = first_update(trainer(of_method("spo", tmp_path)))
    assert float(metrics["policy_loss"]) == pytest.approx(math.log(2), abs=1e-4)
    assert float(metrics["pairs_kept"]) == 1.0
    assert found.norm() > 0


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_spos_gradient_is_that_of_its_equation(tmp_path: Path, micro_batch: int) -> None:
    run = moved(trainer(of_method("spo", tmp_path, micro_batch=micro_batch)), WITHIN)
    loss = spo_by_hand(run)
    metrics, found = first_update(run)
    close(found, gradient(loss, run))
    assert float(metrics["policy_loss"]) == pytest.approx(loss.item(), rel=1e-4)


def test_a_rollouts_updates_share_its_pairs(tmp_path: Path) -> None:
    config = of_method("spo", tmp_path)
    run = moved(trainer(dataclasses.replace(config, spo=dataclasses.replace(config.spo, updates=16))), WITHIN)
    loss = spo_by_hand(run)
    found = [(metrics, gradient_of(run.network.parameters())) for metrics in run._updates()]
    assert len(found) == 2  # as many as there are steps with candidates
    assert all(float(metrics["pairs_kept"]) == 1.0 for metrics, _ in found)
    close(torch.stack([own for _, own in found]).mean(0), gradient(loss, run))


def spo_by_hand(run: Trainer) -> Tensor:
    """Two prompts, three candidates at the second and the third of four steps; all are pairs."""
    base, schedule, shape = run.base, run.base.noise_schedule, (2, *run.base.latent_shape)
    rng = StepRandomness(run.config.run.seed, 0).generator(13)
    prompts = run.inputs.prompts.sample(2, rng)
    texts = {key: torch.cat([value, run.inputs.encoder.conditions([""] * 2)[key]])
             for key, value in run.inputs.encoder.conditions(prompts).items()}  # fmt: skip
    timesteps, losses = schedule.timesteps(4), list[Tensor]()

    def predicted(x: Tensor, t: float, adapted: bool = True) -> tuple[Tensor, Tensor]:
        call = base.call(torch.cat([x, x]), torch.full((4,), t), texts)
        output = run.adapter.generate_and_forward(call)[0] if adapted else base.backbone(**call)[0]
        cond, uncond = output.chunk(2)
        eps = uncond + run.config.objective.guidance_scale * (cond - uncond)
        a = schedule.signal(torch.tensor([t]))
        return (x - (1 - a).sqrt() * eps) / a.sqrt(), eps

    def following(x: Tensor, index: int, adapted: bool = True) -> torch.distributions.Normal:
        x0, eps = predicted(x, timesteps[index], adapted)
        a, b = (schedule.signal(torch.tensor([t])) for t in timesteps[index : index + 2])
        std = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        mean = b.sqrt() * x0 + (1 - b - std**2).sqrt() * eps
        return torch.distributions.Normal(mean, std.expand_as(mean))

    x = normal(shape, rng)
    for index in range(3):
        density = following(x, index)
        sampled = [density.mean + density.stddev * normal(shape, rng) for _ in range(3 if index else 1)]
        drawn = torch.stack(sampled).detach()
        if index:
            reward = torch.stack([
                run.inputs.rewards(base.decode(predicted(each, timesteps[index + 1])[0]), prompts)[0]
                for each in drawn
            ])  # fmt: skip
            with torch.no_grad():
                reference = following(x, index, adapted=False)
            for row in range(2):
                best, worst = (drawn[int(of(reward[:, row])), row] for of in (torch.argmax, torch.argmin))
                ratio_w, ratio_l = (
                    (density.log_prob(each)[row] - reference.log_prob(each)[row]).mean().exp().clamp(0.9, 1.1)
                    for each in (best, worst)
                )
                losses.append(-torch.log(torch.sigmoid(10.0 * (ratio_w.log() - ratio_l.log()))))
            picks = (3 * rng.random(2)).astype(int).tolist()
            x = torch.stack([drawn[pick, row] for row, pick in enumerate(picks)])
        else:
            x = drawn[0]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("what", ["identical candidates", "images that are not finite"])
def test_what_cannot_be_compared_is_no_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run = moved(trainer(of_method("spo", tmp_path)))
    if what == "identical candidates":
        ones = torch.ones(2, *run.base.latent_shape)
        monkeypatch.setattr(Step, "normal", lambda self, count, rng: ones)
    else:
        run.base.decode = lambda latents: torch.full((len(latents), 3, 64, 64), math.nan)  # type: ignore
    metrics, found = first_update(run)
    assert float(metrics["pairs_kept"]) == 0.0
    assert float(metrics["policy_loss"]) == 0.0
    assert not found.any()


@pytest.mark.parametrize("variant", ["S", "P", "I"])
def test_candidates_are_sampled_as_a_rollout_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """With one noise for all candidates it does not matter which goes on."""
    run = moved(trainer(of_method("spo", tmp_path, variant)))  # type: ignore[arg-type]
    noise = torch.randn(2, *run.base.latent_shape, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(Step, "normal", lambda self, count, rng: noise)
    step = run._new_step()
    with torch.no_grad():
        walk = spo.Walk(step)
        walk.pairs()

    def move(index: int, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        return spo.transition(step, x, x0, eps, *walk.timesteps[index : index + 2]).sample(noise)

    expected = rollout(
        run.base, run.adapter, run.schedule, walk.cond, walk.uncond, noise, steps=4,
        guidance_scale=run.config.objective.guidance_scale, move=move,
    )  # fmt: skip
    for found, state in zip(walk.visited, expected.states[:3], strict=True):
        torch.testing.assert_close(found, state, rtol=1e-3, atol=1e-3)


def test_rows_that_only_a_sharded_model_needs_add_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_method("spo", tmp_path, prompt_batch=3)
    config = dataclasses.replace(config, spo=dataclasses.replace(config.spo, threshold=0.6))
    metrics, found = first_update(moved(trainer(config), WITHIN))
    assert 0.0 < float(metrics["pairs_kept"]) < 1.0
    monkeypatch.setattr(spo, "uses_fsdp", lambda accelerator: True)
    padded, same = first_update(moved(trainer(config), WITHIN))
    close(same, found)
    for name in ("policy_loss", "pairs_kept", "pairs_right"):
        assert float(padded[name]) == pytest.approx(float(metrics[name]), rel=1e-4)
