"""Every training method in whole runs: stopped and resumed, in two processes, on every base model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from smoke_recipes import RECIPES, cut_down
from test_trainer_processes import EACH, ONE, gradient_and_row, in_two_processes
from tiny_runs import curve, of_method, trainer

from hyperalign.errors import HyperAlignError
from hyperalign.rewards import clip
from train.config import TrainConfig
from train.inputs import smoke_inputs
from train.methods.passes import StepPasses, step_passes
from train.methods.settings import (
    TABLES,
    AlignPropConfig,
    DpoConfig,
    GrpoConfig,
    KtoConfig,
    MethodName,
    SpoConfig,
    SrpoConfig,
)
from train.models.architectures import descending_sizes
from train.trainer import Trainer

OTHERS = [name for name in get_args(MethodName) if name != "hyperalign"]
SETTINGS: dict[str, Any] = {
    "grpo": {"group": 4, "updates": 2, "clip_range": 0.2},
    "alignprop": {"last_steps": 2},
    "kto": {"beta": 1.0},
    "spo": {"candidates": 2, "threshold": 0.01},
}
Runs = Callable[..., Any]


@pytest.mark.parametrize(("method", "variant"), [*((name, "S") for name in OTHERS), ("mix_grpo", "I")])
def test_a_run_that_was_stopped_goes_on_exactly(tmp_path: Path, method: MethodName, variant: Any) -> None:
    trainer(of_method(method, tmp_path / "whole", variant)).fit()

    class End(Exception):
        pass

    def stop(row: Any) -> None:
        if row["step"] == 1:
            raise End

    with pytest.raises(End):
        trainer(of_method(method, tmp_path / "parts", variant)).fit(stop)
    trainer(of_method(method, tmp_path / "parts", variant)).fit()
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    rows = curve(tmp_path / "whole")
    assert len(rows) == 3
    assert all(row["grad_norm"] > 0 and not row["skipped"] for row in rows)


@pytest.mark.parametrize("method", OTHERS)
def test_two_processes_train_as_one_with_twice_the_batch(
    small_run: Runs, tmp_path: Path, method: MethodName
) -> None:
    def job(rank: int) -> Any:
        run = small_run(
            tmp_path / f"out{rank}", accelerator=Accelerator(cpu=True), objective=EACH | {"method": method},
            **SETTINGS,
        )  # fmt: skip
        return gradient_and_row(run)

    (gradient, row, seen), (other_gradient, _, _) = in_two_processes(job, tmp_path)
    run = small_run(tmp_path / "one", objective=ONE | {"method": method}, **SETTINGS)
    expected, whole, images = gradient_and_row(run)
    assert torch.equal(gradient, other_gradient)
    assert expected.norm() > 0
    assert (gradient - expected).norm() <= 2e-3 * expected.norm()
    for name in {"reward", "reward_loss", "preference_loss", "policy_loss", "reference_point"} & whole.keys():
        assert row[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), name
    assert seen == images


@pytest.fixture
def small_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    small = clip.ClipShape(clip.Tower(64, 2, 4), clip.Tower(48, 2, 4), 768, "quick_gelu", patch=32)
    monkeypatch.setattr(clip, "VIT_L_14", small)


@pytest.mark.usefixtures("small_clip")
@pytest.mark.parametrize("conditioning", ["full", "none"])
@pytest.mark.parametrize("recipe", ["sd15_s", "flux_s"])
@pytest.mark.parametrize("method", OTHERS)
def test_every_method_takes_a_step_on_real_architectures(
    tmp_path: Path, method: MethodName, recipe: str, conditioning: Any
) -> None:
    config = on_base(recipe, method, tmp_path, conditioning)
    accelerator, shape = Accelerator(cpu=True), list(descending_sizes(config.model.base))[-1]
    run = Trainer(config, smoke_inputs(config, accelerator, shape), accelerator)
    run.fit()
    (row,) = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["grad_norm"] > 0
    assert not row["skipped"]
    assert run.path.exists()


def on_base(recipe: str, method: MethodName, out: Path, conditioning: Any = "full") -> TrainConfig:
    """Returns a step of a method on a real architecture."""
    found = cut_down(RECIPES / f"{recipe}.toml", out)
    small = {"prompt_batch": 1, "rollout_steps": 3, "preference_batch": 2, "timesteps": 1, "skip_first": 0}
    return dataclasses.replace(
        found,
        network=dataclasses.replace(found.network, conditioning=conditioning),
        objective=dataclasses.replace(
            found.objective, method=method, reward_weight=1.0, preference_weight=1.0, **small
        ),
        optim=dataclasses.replace(found.optim, steps=1),
        validation=dataclasses.replace(found.validation, every=0),
        alignprop=AlignPropConfig(last_steps=2, eta=0.0),
        grpo=GrpoConfig(group=2, updates=1, window=1, eta=0.3),
        srpo=SrpoConfig(positive=("a dog. {}",), negative=("two cats. {}",)),
        spo=SpoConfig(candidates=2, threshold=0.0, eta=0.3),
    )


# What a step takes


@pytest.mark.parametrize("method", get_args(MethodName))
def test_the_counted_passes_are_those_of_a_step(tmp_path: Path, method: MethodName) -> None:
    config = dataclasses.replace(
        of_method(method, tmp_path, micro_batch=1), alignprop=AlignPropConfig(last_steps=2)
    )
    run = trainer(config)
    forwards, backwards = [0.0], [0.0]

    def count(module: Any, given: Any, named: Any, output: Any) -> None:
        rows = len(named["sample"])
        forwards[0] += rows
        backwards[0] += rows * output[0].requires_grad

    run.base.backbone.register_forward_hook(count, with_kwargs=True)
    for metrics in run._updates():
        run._apply_gradient(metrics)
    expected = step_passes(config)
    assert backwards[0] == expected.backwards(cfg=True)
    if method == "hyperalign":  # its rollout ends at the last drawn step
        assert forwards[0] <= expected.forwards(cfg=True) * 2
    else:
        assert forwards[0] == expected.forwards(cfg=True)


def test_largest_batches_are_those_that_micro_batches_divide(tmp_path: Path) -> None:
    def passes(method: MethodName, **objective: Any) -> StepPasses:
        return step_passes(of_method(method, tmp_path, **objective))

    assert passes("hyperalign").largest_batch == 4
    assert passes("hyperalign", preference_weight=0.0).largest_batch == 2
    assert passes("dance_grpo").largest_batch == 4  # 2 prompts x 4 samples in 2 updates
    assert passes("dpo").pair == 2
    assert passes("srpo", state="noised").rollouts == 0


@pytest.mark.parametrize(("method", "own"), [("hyperalign", set[str]()), ("mix_grpo", {"grpo"})])
def test_a_header_has_the_settings_of_the_runs_own_method_alone(
    tmp_path: Path, method: MethodName, own: set[str]
) -> None:
    run = trainer(of_method(method, tmp_path))
    assert set(run.results.header(0).training["recipe"]) & set(TABLES.values()) == own


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GrpoConfig(group=1, updates=1), "grpo.group is 1; expected 2 or more: samples are compared"),
        (lambda: GrpoConfig(group=6, updates=4), "grpo.updates is 4; expected a divisor of grpo.group, 6"),
        (lambda: GrpoConfig(eta=0.0), "grpo.eta is 0.0; expected above 0: without noise"),
        (lambda: DpoConfig(beta=0.0), "dpo.beta is 0.0; expected above 0"),
        (lambda: KtoConfig(desirable_share=1.0), "kto.desirable_share is 1.0; expected above 0 and below 1"),
        (lambda: SrpoConfig(positive=("Real",)), "srpo.positive is .*wordings with {} in the prompt's place"),
        (lambda: SrpoConfig(positions=(0.9, 0.5)), "srpo.positions is"),
        (lambda: SpoConfig(candidates=1), "spo.candidates is 1; expected 2 or more: the best and the worst"),
        (lambda: SpoConfig(threshold=1.0), "spo.threshold is 1.0; expected 0 up to 1"),
        (lambda: SpoConfig(eta=0.0), "spo.eta is 0.0; expected above 0: without noise"),
        (lambda: SpoConfig(clip_range=1.0), "spo.clip_range is 1.0; expected above 0 and below 1"),
        (lambda: AlignPropConfig(last_steps=-1), "alignprop.last_steps is -1; expected 0 or more"),
    ],
)
def test_settings_out_of_range_are_one_sentence(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(HyperAlignError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "objective", "message"),
    [
        ("dpo", {"preference_weight": 0.0}, "objective.preference_weight is 0.0; expected above 0 for dpo"),
        ("srpo", {"reward_weight": 0.0}, "objective.reward_weight is 0.0; expected above 0 for srpo"),
    ],
)
def test_a_method_without_its_loss_is_refused(
    tmp_path: Path, method: MethodName, objective: dict[str, float], message: str
) -> None:
    with pytest.raises(HyperAlignError, match=message):
        of_method(method, tmp_path, **objective)


def test_spo_must_leave_some_steps_to_compare(tmp_path: Path) -> None:
    config = of_method("spo", tmp_path)
    with pytest.raises(HyperAlignError, match="spo.skipped_share is 0.8; expected a share that leaves some"):
        dataclasses.replace(config, spo=SpoConfig(skipped_share=0.8))


def test_a_method_that_compares_images_needs_pairs(small_run: Runs) -> None:
    run = small_run(objective={"method": "dpo"})
    run.inputs = dataclasses.replace(run.inputs, pairs=None)
    with pytest.raises(HyperAlignError, match=r"needs pairs of images"):
        run.fit()
