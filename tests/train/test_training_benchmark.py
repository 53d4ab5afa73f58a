"""The training benchmark on reduced models: it times the trainer's own step and says what was reduced."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL
from torch import nn

from benchmarks.training import (
    FOLDER,
    RECIPES,
    Options,
    Phase,
    config_of,
    main,
    metrics,
    name_of,
    reductions,
    shape_of,
)
from hyperalign.rewards import clip
from hyperalign.rewards.clip import ClipShape, Tower
from train import inputs
from train.config import BaseName
from train.models.architectures import FULL_SIZES, ModelSize, autoencoder
from train.preflight import step_costs
from train.preflight.estimate import Work
from train.recipe import load_recipe

SMALL = Options(
    base="flux", device="cpu", bf16=False, batch=1, preferred=1, timesteps=1, rollout_steps=2, resolution=64,
    text_tokens=16, double_blocks=5, single_blocks=1, narrow=12, reward="clip", repeats=1,
    gradient_checkpointing="decoder",
)  # fmt: skip


def small_decoder(base: BaseName, _size: ModelSize | None = None) -> nn.Module:
    true: Any = autoencoder(base)
    return AutoencoderKL.from_config({**true.config, "block_out_channels": (32, 32, 64, 64)})


def test_a_step_is_timed_by_phase_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "VIT_L_14", ClipShape(Tower(64, 2, 4), Tower(48, 2, 4), 32, "gelu", patch=32))
    for module in (inputs, step_costs):
        monkeypatch.setattr(module, "autoencoder", small_decoder)
    results = main(dataclasses.replace(SMALL, out=tmp_path, profile=tmp_path))
    assert json.loads((tmp_path / "training_flux_1x1_cpu.json").read_text(encoding="utf-8")) == results
    seconds = {name: phase["seconds"]["median"] for name, phase in results["phases"].items()}
    parts = ("rollout", "reward", "preference", "optimiser")
    assert min(seconds.values()) > 0
    assert sum(seconds[name] for name in parts) == pytest.approx(seconds["step"])
    assert results["samples_per_second"]["median"] == pytest.approx(2 / seconds["step"])
    gradient = results["phases"]["gradient"]
    assert 0 < gradient["model_tflop"] < gradient["tflop"]
    assert gradient["with_recomputation"] / gradient["utilisation"] == pytest.approx(
        gradient["tflop"] / gradient["model_tflop"]
    )
    printed = capsys.readouterr().out
    assert "reduced: 64 px instead of 1024" in printed
    assert "clip as reward instead of hpsv2.1" in printed
    assert "aten::" in (tmp_path / "training_flux_1x1_cpu.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("base", ["sd15", "sdxl", "flux", "sd3"])
def test_without_options_it_is_the_recipe_on_the_true_model(base: Any, tmp_path: Path) -> None:
    options = Options(base=base)
    config = config_of(options, tmp_path)
    assert reductions(options, config) == []
    assert shape_of(options) == FULL_SIZES[base] != ModelSize(width_divisor=2)
    recipe = load_recipe(FOLDER / f"{RECIPES[base]}.toml")
    for key in ("prompt_batch", "preference_batch", "timesteps", "rollout_steps", "micro_batch"):
        assert getattr(config.objective, key) == getattr(recipe.objective, key)
    assert config.model.gradient_checkpointing == recipe.model.gradient_checkpointing


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (Options(base="sdxl"), "training_sdxl"),
        (Options(base="sdxl", batch=2, timesteps=4, compile=True), "training_sdxl_2x4_compiled"),
        (Options(base="flux", batch=2, channels_last=True), "training_flux_2x2_channels_last"),
    ],
)
def test_a_result_is_named_by_what_is_not_the_recipe_s(options: Options, name: str, tmp_path: Path) -> None:
    assert name_of(options, config_of(options, tmp_path)) == name


def test_utilisation_is_the_models_own_work_over_what_products_could_do() -> None:
    step = {"rollout": Phase(1.0, 3.0), "reward": Phase(2.0, 5.0), "preference": Phase(2.0, 4.0),
            "optimiser": Phase(1.0, 1.0)}  # fmt: skip
    found = metrics([step, step], Work(4.0, 12.0, 4.0), Work(4.0, 8.0, 2.0), rate=5.0, samples=12)
    assert found["phases"]["gradient"] == {
        "seconds": {"median": 4.0, "min": 4.0, "max": 4.0}, "peak_gib": 5.0, "tflop": 16e-12,
        "model_tflop": 10e-12, "utilisation": 0.5, "with_recomputation": 0.8,
    }  # fmt: skip
    assert found["samples_per_second"]["median"] == 2.0
