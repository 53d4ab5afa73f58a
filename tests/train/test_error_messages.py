"""What a person can put right is a sentence and an exit status in every command line, never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from hyperalign.errors import HyperAlignError
from train import encode, keytimes
from train.config import RunConfig, TrainConfig
from train.preflight.input_checks import check_trackers
from train.train import main

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
FULL = "CUDA out of memory. Tried 2.00 GiB.\nMore lines."


def fills_memory(*_: Any, **__: Any) -> Any:
    """Stands for what a GPU has no memory for."""
    raise torch.cuda.OutOfMemoryError(FULL)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the GPU's memory is full (CUDA out of memory. Tried 2.00 GiB.)")
    return line


def test_models_too_large_for_the_gpu_say_what_to_lower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("train.train.load_inputs", fills_memory)
    assert main(["--recipe", str(RECIPES / "tiny_s.toml"), "--run.out", str(tmp_path)]) == 1
    assert "set model.vae to taesd" in last_line(capsys)


def test_too_large_batches_of_images_say_what_to_lower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("train.encode.image_encoder", fills_memory)
    (tmp_path / "list.jsonl").write_text('{"image": "a.jpg", "caption": "a"}', encoding="utf-8")
    recipe, source = str(RECIPES / "tiny_s.toml"), str(tmp_path / "list.jsonl")
    assert encode.main(["--recipe", recipe, "--source", source, "--out", str(tmp_path), "--batch", "8"]) == 1
    assert "Lower --batch, now 8" in last_line(capsys)


def test_too_many_prompts_at_once_for_the_key_times_say_what_to_lower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("train.keytimes.distance_curve", fills_memory)
    recipe, out = str(RECIPES / "tiny_p.toml"), str(tmp_path / "keytimes")
    assert keytimes.main(["--recipe", recipe, "--out", out]) == 1
    assert "Lower objective.micro_batch: so many prompts" in last_line(capsys)


@pytest.mark.parametrize("switch", [[], ["--smoke"]])
def test_a_tracker_that_is_none_is_named_with_the_nearest(
    switch: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe, out = str(RECIPES / "tiny_s.toml"), str(tmp_path / "run")
    assert main(["--recipe", recipe, *switch, "--run.out", out, "--run.trackers", "tensorbord"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: run.trackers names 'tensorbord', which is no tracker. Did you mean 't")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_says_how_to_install_it() -> None:
    missing = min(set(map(str, LoggerType)) - {"all"} - set(map(str, get_available_trackers())))
    check_trackers(TrainConfig(run=RunConfig(trackers=("all",))))
    with pytest.raises(HyperAlignError, match=f"not installed. Run pip install {missing}, or take it out"):
        check_trackers(TrainConfig(run=RunConfig(trackers=("all", missing))))
