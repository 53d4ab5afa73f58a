"""The recipes of the training methods: budgets on the tiny model, steps, and the page of their costs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from accelerate import Accelerator
from smoke_recipes import RECIPES, cut_down

from hyperalign import checkpoint
from hyperalign.rewards import clip
from scripts import method_costs
from train.config import BaseName, TrainConfig
from train.generation.options import DasOptions, Options, SearchOptions, TestTime
from train.inputs import smoke_inputs
from train.methods.passes import step_passes
from train.methods.settings import MethodName
from train.models.architectures import descending_sizes
from train.preflight.estimate import Work
from train.recipe import load_recipe
from train.train import main, parse
from train.trainer import Trainer

FOLDER = RECIPES / "methods"
METHODS = ("alignprop", "draft", "dpo", "kto", "dance_grpo", "mix_grpo", "srpo", "spo", "sft", "reward_only")
BASES = ("tiny", "sd15", "flux")


def recipe(base: str, method: str) -> TrainConfig:
    return load_recipe(FOLDER / f"{base}_{method}.toml")


def test_every_method_has_a_recipe_for_every_base() -> None:
    assert {path.stem for path in FOLDER.glob("*")} == {f"{b}_{m}" for b in BASES for m in METHODS}
    for base in BASES:
        assert {recipe(base, method).objective.method for method in METHODS} == set(get_args(MethodName))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_trains_a_lora_of_the_static_recipes_shape(base: str, method: str) -> None:
    config, static = recipe(base, method), load_recipe(RECIPES / f"{base}_static.toml")
    assert (config.network, config.model) == (static.network, static.model)
    o, name = config.objective, config.objective.method
    assert name == {"draft": "alignprop", "sft": "hyperalign", "reward_only": "hyperalign"}.get(
        method, method
    )
    assert bool(o.reward_weight) == (method != "sft")
    assert (config.alignprop.last_steps == 1) == (method == "draft")
    assert o.needs_preference_images == (method == "sft")
    assert o.needs_pairs == (method in ("dpo", "kto"))
    if o.optimised:
        assert o.optimised == static.objective.rewards
        assert config.validation.rewards == static.validation.rewards


@pytest.mark.parametrize(("base", "method"), [("tiny", "srpo"), ("sd15", "dpo"), ("flux", "dance_grpo")])
def test_the_same_recipe_trains_s_by_one_option(base: str, method: str) -> None:
    arguments = ["--recipe", str(FOLDER / f"{base}_{method}.toml"), "--network.conditioning", "full"]
    config, _ = parse(arguments)
    assert config.network == load_recipe(RECIPES / f"{base}_s.toml").network
    assert config.model.variant == "S"
    static = recipe(base, method)
    assert dataclasses.replace(config, network=static.network) == static


@pytest.mark.parametrize("method", METHODS)
def test_the_budgets_of_the_tiny_recipes_are_equal(method: str) -> None:
    config, static = recipe("tiny", method), load_recipe(RECIPES / "tiny_static.toml")
    budget = config.optim.steps * step_passes(config).of_backbone(cfg=True).total
    assert budget == pytest.approx(
        150 * step_passes(static).of_backbone(cfg=True).total, rel=0.015
    )  # 3 % of each other


def test_a_budget_counts_passes_forwards_and_backwards() -> None:
    passes = step_passes(load_recipe(RECIPES / "tiny_static.toml"))
    # Two prompts for five of eight steps and once with gradient, in both halves of CFG, and 64 images.
    assert passes.of_backbone(cfg=True).total == (2 * (2 * 5 + 2) + 64) + (2 * 2 + 64)
    assert passes.of_backbone(cfg=False).total == (2 * 5 + 2 + 64) + (2 + 64)


# Steps


@pytest.fixture
def small_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    small = clip.ClipShape(clip.Tower(64, 2, 4), clip.Tower(48, 2, 4), 768, "quick_gelu", patch=32)
    monkeypatch.setattr(clip, "VIT_L_14", small)


@pytest.mark.usefixtures("small_clip")
@pytest.mark.parametrize(
    ("base", "method"),
    [
        *(("sd15", method) for method in METHODS if method != "kto"), ("flux", "alignprop"), ("flux", "dpo"),
        ("flux", "kto"), ("flux", "dance_grpo"), ("flux", "mix_grpo"),
    ],
)  # fmt: skip
def test_a_recipe_takes_a_step_on_random_weights(base: str, method: str, tmp_path: Path) -> None:
    config = cut_down(FOLDER / f"{base}_{method}.toml", tmp_path)
    config = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, steps=1),
        validation=dataclasses.replace(config.validation, every=0),
        srpo=dataclasses.replace(config.srpo, positive=("a dog. {}",), negative=("two cats. {}",)),
        spo=dataclasses.replace(config.spo, threshold=0.0),  # random weights tell no candidates apart
    )
    accelerator, shape = Accelerator(cpu=True), list(descending_sizes(config.model.base))[-1]
    run = Trainer(config, smoke_inputs(config, accelerator, shape), accelerator)
    run.fit()
    (row,) = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["grad_norm"] > 0
    assert not row["skipped"]


@pytest.mark.parametrize(
    ("method", "conditioning"), [("srpo", "none"), ("mix_grpo", "none"), ("dpo", "full")]
)
def test_a_tiny_recipe_takes_smoke_steps(method: str, conditioning: str, tmp_path: Path) -> None:
    arguments = [
        "--recipe", str(FOLDER / f"tiny_{method}.toml"), "--smoke", "--run.out", str(tmp_path / "run"),
        "--data.scenes", "16", "--objective.preference-batch", "16", "--network.layers", "1",
        "--network.conditioning", conditioning,
    ]  # fmt: skip
    assert main(arguments) == 0
    header = checkpoint.load(tmp_path / "run_smoke" / "hypernetwork.safetensors").header
    assert header.network.conditioning == conditioning


# The page of the costs


@pytest.mark.parametrize("base", method_costs.BASES)
def test_the_page_has_the_tables_of_now(base: BaseName) -> None:
    page = method_costs.PAGE.read_text(encoding="utf-8")
    assert method_costs.with_tables(page, base) == page, "run python scripts/method_costs.py"


def test_an_image_of_each_test_time_method_takes_what_it_evaluates() -> None:
    work = method_costs.ImageWork(call=1.0, gradient=10.0, decoded=100.0, scored=1000.0)

    def image(method: TestTime, **options: Any) -> Work:
        return work.image(Options(prompts=Path("_"), out=Path("_"), test_time=method, **options))

    assert image("none").total == 50 + 100
    assert image("best-of-N", search=SearchOptions(candidates=20)).total == 20 * (50 + 100 + 1000)
    das = image("das", das=DasOptions(particles=4))
    assert (das.rollout, das.reward) == (4 * 1100, 4 * 50 * 10)
    # 20 of 50 steps are guided, 15 of them three times.
    freedom = image("freedom")
    assert (freedom.rollout, freedom.reward) == (30 + 100, (5 + 3 * 15) * 10)
    # 80 candidates at each of 49 steps, which are decoded and scored.
    searched = image("epsilon-greedy-steps")
    assert searched.total == 50 + 49 * 80 + (49 * 80 + 1) * 1100


@pytest.mark.parametrize("base", method_costs.BASES)
def test_what_a_run_reads_is_counted(base: BaseName) -> None:
    o = recipe(base, "dpo").objective
    count = 4 * recipe(base, "dpo").optim.steps * o.preference_batch
    assert method_costs.data(recipe(base, "dpo")) == f"{count:,} pairs"
    assert method_costs.data(recipe(base, "srpo")) == "prompts"
    assert method_costs.data(recipe(base, "sft")).endswith(" images")
