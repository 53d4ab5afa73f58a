"""Training checkpoints on a full disk, and in a folder that cannot be made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from in_processes import in_processes

from hyperalign.errors import HyperAlignError
from train.checkpoints import TrainingCheckpoints


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX")
def test_a_full_disk_keeps_the_checkpoint_before_and_names_the_fix(tmp_path: Path) -> None:
    import full_disk

    folder = tmp_path / "checkpoints"
    (done,) = in_processes(1, tmp_path, full_disk.checkpoints, folder)
    assert done.status == 0, done.errors
    assert "training checkpoint of step 2 cannot be written" in done.output
    assert "Free some space and run the same command again" in done.output
    assert [path.name for path in folder.iterdir()] == ["step-000001.pt"]
    state = TrainingCheckpoints(folder, 2).newest()
    assert state is not None
    assert state["step"] == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(HyperAlignError, match="cannot be written"):
        TrainingCheckpoints(tmp_path / "file" / "checkpoints", 1).save({"step": 1, "x": torch.zeros(1)}, 1)
