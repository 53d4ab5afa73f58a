"""The trainer's command lines as people meet them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image

from train import keytimes
from train.train import run

ROOT = Path(__file__).parents[2]
ACCELERATE = sorted((ROOT / "train" / "recipes" / "accelerate").glob("*.yaml"))


def test_key_times_are_written_with_their_curve_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / "train" / "recipes" / "tiny_p.toml"
    out = tmp_path / "deep" / "keytimes"
    status = keytimes.main(
        ["--recipe", str(recipe), "--out", str(out), "--prompts", "2", "--steps", "8", "--count", "1"]
    )
    assert status == 0
    report = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert len(report["curve"]) == 7
    assert all(point["distance"] > 0 for point in report["curve"])
    assert report["key_times"][0] in [pytest.approx(point["u"], abs=1e-3) for point in report["curve"]]
    assert f"key_times = [{report['key_times'][0]:.4f}]" in capsys.readouterr().out
    with Image.open(out.with_suffix(".png")) as plot:
        assert plot.size == (900, 480)
        assert len(plot.convert("RGB").getcolors(1 << 20) or []) > 4


def test_a_missing_recipe_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keytimes.main(["--recipe", str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


class FullGpu:
    """A trainer whose GPU's memory runs out at its second step."""

    path = Path("nowhere")
    step = 1

    def __init__(self, config: Any) -> None:
        self.config = config
        self.accelerator = type("", (), {"is_main_process": True})()

    def fit(self, on_step: Any) -> None:
        on_step({"step": 1, "reward": 1.0})
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")


def test_too_little_gpu_memory_says_which_setting_to_lower(capsys: pytest.CaptureFixture[str]) -> None:
    from train.config import TrainConfig

    trainer: Any = FullGpu(TrainConfig())
    assert run(trainer) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "Tried to allocate 2.00 GiB" in message
    assert "Lower objective.micro_batch first" in message


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_the_shipped_configurations(path: Path) -> None:
    config: Any = load_config_from_file(str(path))
    processes = {"1_gpu": 1, "4_gpus": 4, "8_gpus": 8, "2_nodes": 16, "fsdp2": 2}
    assert config.num_processes == processes[path.stem]
    assert config.num_machines == (2 if path.stem == "2_nodes" else 1)
    assert config.mixed_precision == "no"
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
