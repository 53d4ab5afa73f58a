"""Around a step: checkpoints on a full disk, the log, the time left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperalign.errors import HyperAlignError
from train.checkpoints import TrainingCheckpoints
from train.log import TimeLeft, TrainingLog, flat

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX")
def test_a_full_disk_leaves_the_state_before_and_says_what_to_do(tmp_path: Path) -> None:
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from pathlib import Path
from train.checkpoints import TrainingCheckpoints
from hyperalign.errors import HyperAlignError
checkpoints = TrainingCheckpoints(Path({str(tmp_path)!r}), keep=2)
checkpoints.save({{"step": 1, "x": torch.zeros(10)}}, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoints.save({{"step": 2, "x": torch.zeros(100_000)}}, 2)
except HyperAlignError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    assert "state of step 2 cannot be written" in done.stdout
    assert "Free some space and run the same command again" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["state-000001.pt"]
    state = TrainingCheckpoints(tmp_path, 2).newest()
    assert state is not None
    assert state["step"] == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(HyperAlignError, match="cannot be written"):
        TrainingCheckpoints(tmp_path / "file" / "checkpoints", 1).save({"step": 1, "x": torch.zeros(1)}, 1)


def test_the_log_forgets_what_will_be_done_again(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.jsonl")
    for step in range(5):
        log.append({"step": step, "loss": 1 / 3, "validation": {"clip": 2 / 3}})
    log.truncate(3)
    rows = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"step": step, "loss": 0.333333, "validation": {"clip": 0.666667}} for step in range(3)]
    log.truncate(0)
    assert not log.path.exists()


def test_trackers_get_numbers_under_slashed_names() -> None:
    row = {
        "step": 3,
        "skipped": False,
        "seconds_left": None,
        "validation": {"clip": 0.5, "geneval": {"colors": 1}},
    }
    assert flat(row) == {
        "step": 3.0,
        "skipped": 0.0,
        "validation/clip": 0.5,
        "validation/geneval/colors": 1.0,
    }


def test_the_first_step_tells_no_time_left() -> None:
    clock = TimeLeft(steps=10)
    assert clock.after(1) is None
    left = clock.after(2)
    assert left is not None
    assert left >= 0
    assert clock.after(10) == 0.0
