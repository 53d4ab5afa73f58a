"""A few real steps on the embedded model: resume, interruption, every variant, load and sample."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperalign import checkpoint
from hyperalign.errors import HyperAlignError
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.schedule import Variant
from hyperalign.targets import PerceptionMode
from train.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from train.evaluate import sample_all
from train.loop import Trainer

ROOT = Path(__file__).parents[2]


def small(out: Path, variant: Variant = "S", mode: PerceptionMode = "prefix", **network: Any) -> TrainConfig:
    keys = (0.6,) if variant == "P" else ()
    return TrainConfig(
        model=ModelConfig(variant=variant, mode=mode, key_times=keys),
        network=HyperNetworkConfig(**({"layers": 1} | network)),
        objective=ObjectiveConfig(prompts=2, rollout_steps=3, timesteps=1, preferred=4),
        optim=OptimConfig(steps=4, warmup=2, lr=1e-2),
        data=DataConfig(scenes=16, cache=ROOT / "build" / "tiny"),
        eval=EvalConfig(every=0),
        run=RunConfig(out=out, save_every=2),
    )


def curve(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_an_interrupted_run_continues_the_exact_loss_curve(tmp_path: Path) -> None:
    Trainer(small(tmp_path / "whole")).fit()

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(small(tmp_path / "broken")).fit(interrupt)
    resumed = Trainer(small(tmp_path / "broken"))
    assert resumed.step == 3
    resumed.fit()
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    whole, broken = (
        checkpoint.load(tmp_path / name / "hypernetwork.safetensors") for name in ("whole", "broken")
    )
    for key, value in whole.network.state_dict().items():
        assert torch.equal(value, broken.network.state_dict()[key]), key


def test_a_run_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    Trainer(dataclasses.replace(small(tmp_path), optim=OptimConfig(steps=1))).fit()
    with pytest.raises(HyperAlignError, match="another recipe"):
        Trainer(small(tmp_path))


@pytest.mark.parametrize(("variant", "generations"), [("S", 4), ("P", 2), ("I", 1)])
def test_train_load_and_sample(tmp_path: Path, variant: Variant, generations: int) -> None:
    trainer = Trainer(small(tmp_path, variant, mode="separate" if variant == "I" else "prefix"))
    trainer.fit()
    loaded = checkpoint.load(trainer.path)
    assert loaded.header.training["steps"] == 4
    options: dict[str, Any] = {"seeds": (0,), "steps": 4, "guidance": 4.0}
    aligned = sample_all(trainer.base, loaded, 2, **options)
    base = sample_all(trainer.base, None, 2, **options)
    assert aligned.generations_per_run == generations
    assert (aligned.images - base.images).abs().max() > 1e-4
    off = sample_all(trainer.base, loaded, 2, strength=0.0, **options)
    assert torch.equal(off.images, base.images)


def test_both_losses_reach_a_static_core(tmp_path: Path) -> None:
    trainer = Trainer(small(tmp_path, conditioning="none"))
    trainer.fit()
    rows = curve(tmp_path)
    assert {"reward", "preference_loss"} <= rows[0].keys()
    assert rows[-1]["grad_norm"] > 0


def test_two_processes_train_together(tmp_path: Path) -> None:
    overrides = ["--optim.steps", "2", "--objective.prompts", "2", "--objective.rollout-steps", "3",
                 "--objective.timesteps", "1", "--objective.skip-first", "1",
                 "--objective.preferred", "4", "--data.scenes", "16",
                 "--eval.every", "0", "--run.out", str(tmp_path / "run")]  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "train/train.py", "--recipe", "train/recipes/tiny_s.toml", *overrides]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(curve(tmp_path / "run")) == 2
    assert checkpoint.load(tmp_path / "run" / "hypernetwork.safetensors").header.training["steps"] == 2
