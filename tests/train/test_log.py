"""log.jsonl, the numbers that trackers get, and the time left."""

from __future__ import annotations

import json
from pathlib import Path

from train.log import TimeLeft, TrainingLog, flat


def test_the_log_drops_the_steps_that_are_taken_again(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.jsonl")
    for step in range(5):
        log.append({"step": step, "loss": 1 / 3, "validation": {"clip": 2 / 3}})
    log.truncate(3)
    rows = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"step": step, "loss": 0.333333, "validation": {"clip": 0.666667}} for step in range(3)]
    log.truncate(0)
    assert not log.path.exists()


def test_trackers_get_numbers_under_slashed_names() -> None:
    metrics = {
        "step": 3,
        "skipped": False,
        "seconds_left": None,
        "validation": {"clip": 0.5, "geneval": {"colors": 1}},
    }
    assert flat(metrics) == {
        "step": 3.0,
        "skipped": 0.0,
        "validation/clip": 0.5,
        "validation/geneval/colors": 1.0,
    }


def test_after_the_first_step_no_time_is_estimated() -> None:
    time_left = TimeLeft(steps=10)
    assert time_left.after(1) is None
    left = time_left.after(2)
    assert left is not None
    assert left >= 0
    assert time_left.after(10) == 0.0
