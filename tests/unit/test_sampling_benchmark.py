"""The sampling benchmark at reduced width: every row is measured, and the file says what it depends on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.bases import Size, build, true_size, twin
from benchmarks.rounds import Row, rounds
from benchmarks.sampling import Options, main
from hyperalign.errors import HyperAlignError

ROWS = ("LoRA", "P prefix", "S separate")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("sd15", {"narrow": 10}),
        ("flux", {"narrow": 12, "double_blocks": 3, "single_blocks": 2, "perception_blocks": 2}),
        ("sd35", {"narrow": 12, "double_blocks": 3, "perception_blocks": 2}),
    ],
)
def test_every_row_is_measured_and_written(
    model, more, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(
        model=model, device="cpu", dtype="float32", pixels=64, text_tokens=4, steps=4, repeats=1, rows=ROWS,
        out=tmp_path, profile=tmp_path / "profile" if model == "flux" else None, **more,
    )  # fmt: skip
    results = main(options)
    path = tmp_path / f"sampling_{model}_cpu.json"
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    assert not list(tmp_path.glob(".*partial"))
    setting = results["setting"]
    assert setting["device_name"] and setting["versions"]["torch"] and setting["versions"]["diffusers"]
    assert (setting["date"][:2], setting["pixels"], setting["dtype"]) == ("20", 64, "float32")
    assert (setting["steps"], setting["repeats"]) == (4, 1)
    assert f"layers {options.narrow} times narrower" in setting["reduced"]
    assert list(results["rows"]) == ["base", *ROWS]
    for name, row in results["rows"].items():
        if "not_measured" in row:
            assert (name, row["not_measured"]) == ("LoRA", "peft missing")
            continue
        metrics = [row["ms_per_forward"], row["run_s"], *([row["ratio"]] if name != "base" else [])]
        for spread in metrics:
            assert 0 < spread["min"] <= spread["median"] <= spread["max"] < math.inf
    written = [results["rows"][name]["generations"] for name in ("base", "P prefix", "S separate")]
    assert written == [0, 3, 4]
    for parts in results["parts_ms"].values():
        assert all(math.isfinite(value) for value in parts.values())
        assert parts["generation"] > 0 < parts["perception"]
    if options.profile:
        assert "aten::" in (options.profile / "sampling_flux_cpu_S_separate.txt").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert "64 px instead of" in printed and "| S separate |" in printed


def test_a_twin_shares_every_weight_and_nothing_else() -> None:
    model = build("sd15", Size(64, 4, 0, 0, narrow=10), CPU, torch.float32).model
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not set(model.modules()) & set(other.modules())


def test_no_round_begins_after_the_deadline_and_the_first_always_runs() -> None:
    seen: list[int] = []

    def report(rows: dict[str, Row], plain: Row) -> None:
        seen.append(len(rows["row"].ratios))
        assert len(plain.seconds) == len(rows["row"].ratios)

    work = torch.ones(200, 200)
    rounds(lambda: work @ work, {"row": lambda: work @ work}, CPU, 5, deadline=0.0, report=report)
    assert seen == [1]


def test_the_base_is_measured_where_nothing_else_can_be() -> None:
    taken: list[int] = []
    rounds(lambda: None, {}, CPU, 2, math.inf, lambda rows, plain: taken.append(len(plain.seconds)))
    assert taken == [1, 2]


def test_reductions_are_told_and_impossible_widths_refused() -> None:
    assert true_size("flux").reductions("flux") == []
    small = Size(256, 512, 2, 38)
    assert small.reductions("flux") == ["256 px instead of 1024", "2 double blocks instead of 19"]
    with pytest.raises(HyperAlignError, match="width divisor is 7; expected a divisor of 24"):
        build("flux", Size(64, 4, 1, 1, narrow=7), CPU, torch.float32)
