"""A backbone spread over two processes trains as two whole copies do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from in_processes import in_processes
from sharded_runs import copies_and_shards

NAMES = ("flux_s.toml", "sd15_s.toml")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per recipe and way to hold the backbone; all run in the same two processes."""
    folder = tmp_path_factory.mktemp("runs")
    done = in_processes(2, folder, copies_and_shards, folder, NAMES)
    assert [process.status for process in done] == [0, 0], done
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
