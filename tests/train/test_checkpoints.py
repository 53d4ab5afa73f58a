"""Training checkpoints on a full disk, and in a folder that cannot be made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperalign.errors import HyperAlignError
from train.checkpoints import TrainingCheckpoints

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX")
def test_a_full_disk_keeps_the_checkpoint_before_and_names_the_fix(tmp_path: Path) -> None:
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
    assert "training checkpoint of step 2 cannot be written" in done.stdout
    assert "Free some space and run the same command again" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001.pt"]
    state = TrainingCheckpoints(tmp_path, 2).newest()
    assert state is not None
    assert state["step"] == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(HyperAlignError, match="cannot be written"):
        TrainingCheckpoints(tmp_path / "file" / "checkpoints", 1).save({"step": 1, "x": torch.zeros(1)}, 1)
