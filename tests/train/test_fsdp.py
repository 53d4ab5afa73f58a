"""A backbone spread over two processes trains as two whole copies do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = (sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--num_processes", "2",
          "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
          "--multi_gpu")  # fmt: skip
NAMES = ("flux_s.toml", "sd15_s.toml")
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
sys.path.insert(0, {tests!r})
import train.inputs
from accelerate import Accelerator
from smoke_recipes import RECIPES, cut_down
from train.models.architectures import descending_sizes
from train.trainer import Trainer
from train.inputs import smoke_inputs

accelerator = Accelerator()
accelerator.end_training = lambda: None  # or the first run would end the processes' group
for recipe in {recipes!r}:
    for kind in ("copies", "shards"):
        out = Path(sys.argv[1]) / recipe / kind
        config = cut_down(RECIPES / recipe, out)
        # Accelerate itself speaks of FSDP on GPUs alone; the sharding works on CPUs too.
        train.inputs.uses_fsdp = lambda _, kind=kind: kind == "shards"
        shape = list(descending_sizes(config.model.base))[-1]
        inputs = smoke_inputs(config, accelerator, shape)
        weights = list(inputs.base.backbone.parameters())
        own = sum((p.to_local() if kind == "shards" else p).numel() for p in weights)
        Trainer(config, inputs, accelerator).fit()
        if accelerator.is_main_process:
            (out / "own").write_text(str(own / sum(p.numel() for p in weights)))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per recipe and way to hold the backbone; all run in the same two processes."""
    folder = tmp_path_factory.mktemp("runs")
    program = folder / "program.py"
    tests = str(Path(__file__).parent)
    program.write_text(PROGRAM.format(root=str(ROOT), tests=tests, recipes=NAMES), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*LAUNCH, str(program), str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def outcome(folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Returns the log of a run, and the share of the backbone in one process."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows, float((folder / "own").read_text())


@pytest.mark.parametrize("recipe", NAMES)
def test_a_sharded_backbone_gives_the_same_losses(runs: Path, recipe: str) -> None:
    copies, whole = outcome(runs / recipe / "copies")
    shards, part = outcome(runs / recipe / "shards")
    assert whole == 1.0
    assert part < 0.6
    for one, other in zip(copies, shards, strict=True):
        for name in ("reward_loss", "preference_loss", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-3)
    assert shards[-1]["validation"]["tiny reward"] == pytest.approx(
        copies[-1]["validation"]["tiny reward"], rel=1e-2
    )
