"""The shipped recipes take three real steps on random weights, cut down to what a small machine holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from smoke_recipes import RECIPES, cut_down

from hyperalign import checkpoint
from hyperalign.hosts.diffusers.adapter import Call
from hyperalign.rewards import clip
from train.data.random_inputs import RandomPromptEncoder
from train.inputs import smoke_inputs
from train.methods.hyperalign import preference_pass, reward_pass, rewarded_states
from train.models.architectures import FULL_SIZES, descending_sizes
from train.models.base import Conditions
from train.preflight.smoke import SIDE, described, smoke_config
from train.recipe import load_recipe
from train.train import main
from train.trainer import Trainer

REAL = sorted(path for path in RECIPES.rglob("*.toml") if not path.stem.startswith("tiny"))
RUN = (
    "sd15_s", "sd15_p", "sd15_i", "sd15_s_paper", "sdxl_s", "sd35m_s",
    "flux_s", "flux_p", "flux_s_hps_clip", "flux_s_paper",
)  # fmt: skip
"""The recipes whose steps differ in code: the others differ in weights, rewards, data or a learned core."""
HALF = ("sd15_i", "flux_p")
"""A U-Net and a transformer that run in bfloat16, as the recipes say."""
GOLDEN: dict[str, dict[str, list[float]]] = json.loads(
    Path(__file__).with_name("golden_losses.json").read_text(encoding="utf-8")
)
"""Both losses of three steps of each family's S recipe, in float32: a refactoring does not change them."""


@pytest.fixture(autouse=True)
def small_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIP score of the same code that takes milliseconds instead of seconds."""
    small = clip.ClipShape(clip.Tower(64, 2, 4), clip.Tower(48, 2, 4), 768, "quick_gelu", patch=32)
    monkeypatch.setattr(clip, "VIT_L_14", small)


@pytest.mark.parametrize("name", RUN)
def test_a_recipe_takes_three_steps_and_writes_a_hypernetwork(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in GOLDEN:  # one recipe of a family measures what its conditioning is worth
        monkeypatch.setattr("train.validation.conditioning", lambda *_: {})
    config = cut_down(RECIPES / f"{name}.toml", tmp_path, bf16=name in HALF)
    shape = list(descending_sizes(config.model.base))[-1]
    accelerator = Accelerator(cpu=True)
    run = Trainer(config, smoke_inputs(config, accelerator, shape), accelerator)
    run.fit()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3
    assert all(row["grad_norm"] > 0 and not row["skipped"] for row in rows)
    assert {"seconds_per_image", *config.objective.rewards} <= rows[-1]["validation"].keys()
    assert (name in GOLDEN) == ("gain" in rows[-1]["validation"].get("conditioning", {}))
    assert "diversity" not in rows[-1]["validation"]  # the only reward is optimised
    loaded = checkpoint.load(run.path)
    assert loaded.header.family == config.model.base
    assert loaded.header.schedule.variant == config.model.variant
    assert loaded.header.mode == config.model.mode
    assert loaded.header.perception_blocks == (4 if config.model.base in ("flux", "sd3") else 0)
    assert max(float(b.abs().max()) for b in loaded.network.b_aux) > 0
    assert (tmp_path / "grids" / "00003.png").is_file()
    for loss, golden in GOLDEN.get(name, {}).items():
        assert [row[loss] for row in rows] == pytest.approx(golden, rel=1e-3)


def test_flux_is_rewarded_at_its_sampling_guidance_and_regresses_without_one(tmp_path: Path) -> None:
    """FLUX.1 dev predicts guided velocities; those of plain images are the targets of no guidance."""
    config = cut_down(RECIPES / "flux_s.toml", tmp_path)
    accelerator = Accelerator(cpu=True)
    inputs = smoke_inputs(config, accelerator, list(descending_sizes("flux"))[-1])
    run = Trainer(config, inputs, accelerator)
    asked, call = list[float](), run.base.call

    def spy(x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> Call:
        asked.extend(conditions["guidance"].tolist())
        return call(x, t, conditions)

    run.base.call = spy
    step = run._new_step()
    reward_pass(step, rewarded_states(step))
    assert set(asked) == {3.5}
    asked.clear()
    preference_pass(run._new_step())
    assert set(asked) == {1.0}


def test_no_caption_of_flux_is_dropped_as_it_samples_without_the_empty_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cut_down(RECIPES / "flux_s.toml", tmp_path)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, caption_dropout=0.9))
    accelerator = Accelerator(cpu=True)
    run = Trainer(config, smoke_inputs(config, accelerator, list(descending_sizes("flux"))[-1]), accelerator)
    captions, conditions = list[str](), RandomPromptEncoder.conditions

    def spy(self: RandomPromptEncoder, prompts: Sequence[str]) -> Conditions:
        captions.extend(prompts)
        return conditions(self, prompts)

    monkeypatch.setattr(RandomPromptEncoder, "conditions", spy)
    preference_pass(run._new_step())
    assert len(captions) == config.objective.preference_batch
    assert "" not in captions


def test_a_machine_with_room_runs_the_true_shape() -> None:
    config = smoke_config(load_recipe(RECIPES / "flux_s.toml"))
    assert "of true shape" in described(config, FULL_SIZES["flux"])
    assert f"at {SIDE} pixels" in described(config, FULL_SIZES["flux"])
    assert "cut down to fit the memory" in described(config, list(descending_sizes("flux"))[1])


def test_smoke_runs_begin_anew_and_leave_the_recipes_own_run_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    program = ["--recipe", str(RECIPES / "tiny_s.toml"), "--run.out", str(out), "--data.scenes", "16",
               "--objective.preference_batch", "16", "--network.layers", "1"]  # fmt: skip
    for _ in range(2):
        assert main([*program, "--smoke"]) == 0
        lines = (tmp_path / "run_smoke" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
        assert not out.exists()
        (tmp_path / "run_smoke" / "log.jsonl").unlink()
    small = ["--optim.steps", "1", "--objective.prompt_batch", "2", "--validation.every", "0",
             "--model.statistics-prompts", "2"]  # fmt: skip
    assert main([*program, *small]) == 0
    assert (out / "hypernetwork.safetensors").is_file()


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_a_smoke_run_keeps_what_is_trained(path: Path) -> None:
    recipe = load_recipe(path)
    config = smoke_config(recipe)
    for key in ("base", "mode", "variant", "perception_blocks"):
        assert getattr(config.model, key) == getattr(recipe.model, key)
    assert config.objective.rewards == recipe.objective.rewards
    assert config.network == recipe.network
    assert config.objective.method == recipe.objective.method
    assert torch.tensor(config.optim.lr) == recipe.optim.lr
