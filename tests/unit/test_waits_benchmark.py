"""The benchmark of waits at reduced size: every row is measured, and the file says what it depends on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.waits import PREPROCESSED, Options, main


def test_every_wait_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(
        device="cpu", sections=("load", "first step", "preprocessing"), families=("sd15",), pixels=64,
        narrow=10, images=(2,), sides=(32,), repeats=1, out=tmp_path,
    )  # fmt: skip
    results = main(options)
    written = json.loads((tmp_path / "waits_cpu.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(results))
    assert str(tmp_path) not in json.dumps(written)
    assert written["setting"]["reduced"] == ["64 px instead of 512", "layers 10 times narrower"]
    rows = written["rows"]
    preprocessed = {f"preprocessing of {names}, 2 x 32 px" for names in PREPROCESSED}
    others = {"load sd15: header", "load sd15: modules", "attach", "first forward after attach"}
    assert preprocessed | others <= set(rows)
    assert sum(name.endswith("the first of a process") for name in rows) == 1
    assert all(0.0 < row["min"] <= row["median"] <= row["max"] for row in rows.values())
    shown = capsys.readouterr().out
    assert all(f"| {name} | " in shown for name in rows)
