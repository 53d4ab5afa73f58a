"""When does conditioning pay: its cells, their trainings, the table and the figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conditioning import (
    METHODS,
    Cell,
    Options,
    best,
    cells,
    config_of,
    line,
    main,
    plot,
)
from hyperalign.families.unet import TINY
from train.recipe import load_recipe
from train.start import trained_numbers

ROOT = Path(__file__).parents[2]
RECIPE = load_recipe(ROOT / "train" / "recipes" / "tiny_s.toml")


def row(cell: Cell, gain: float) -> dict[str, Any]:
    found = {"value": 0.3 + gain, "gain": gain, "low": gain - 0.1, "high": gain + 0.1}
    return {
        "method": cell.method, "rank": cell.rank, "palettes": cell.palettes, "rate": cell.rate,
        "corrections": 8 * cell.palettes, "steps": 5, "trained_numbers": 123_456,
        "metrics": {"geneval": found, "validation_reward": found},
    }  # fmt: skip


def test_ranks_are_varied_at_the_middle_palettes_and_palettes_at_the_middle_rank() -> None:
    found = list(cells(Options(methods=("S",), rates=(1e-3,))))
    assert {(cell.rank, cell.palettes) for cell in found} == {(1, 2), (4, 2), (8, 2), (4, 1), (4, 4)}
    assert len(found) == 5
    assert len(list(cells(Options()))) == 5 * len(METHODS) * 2
    assert len({cell.name for cell in cells(Options())}) == 5 * len(METHODS) * 2


@pytest.mark.parametrize("method", METHODS)
def test_a_cell_changes_the_recipe_where_its_method_says(method: Any, tmp_path: Path) -> None:
    found = config_of(Cell(method, 2, 1, 3e-3), RECIPE, tmp_path, steps=7)
    assert (found.network.rank, found.optim.lr, found.optim.steps) == (2, 3e-3, 7)
    assert found.data.wordings == ("an icon of {}",)
    assert found.model.variant == (method if method in ("I", "P", "S") else "S")
    expected = {"static": "none", "static, as large as S": "none", "decoder without conditioning": "constant"}
    assert found.network.conditioning == expected.get(method, "full")


def test_the_large_static_lora_has_as_many_trained_numbers_as_the_hypernetwork(tmp_path: Path) -> None:
    sizes = {
        method: trained_numbers(config_of(Cell(method, 4, 2, 1e-3), RECIPE, tmp_path), TINY)
        for method in METHODS
    }
    assert sizes["S"] <= sizes["static, as large as S"] < 1.05 * sizes["S"]
    assert sizes["static"] < 0.5 * sizes["S"]


def test_each_method_counts_at_its_best_learning_rate() -> None:
    rows = [row(Cell("S", 4, 2, rate), gain) for rate, gain in ((1e-3, 0.1), (2e-3, 0.3), (4e-3, 0.2))]
    assert [one["rate"] for one in best([*rows, row(Cell("static", 4, 2, 1e-3), 0.0)])] == [2e-3, 1e-3]
    assert line(rows[1]) == "| 16 | 4 | S | 123k | 0.002 | +0.30 [+0.20, +0.40] | +0.30 [+0.20, +0.40] |"


def test_the_figure_has_every_method_against_rank_and_corrections() -> None:
    rows = [row(cell, 0.1 * cell.rank) for cell in cells(Options(rates=(1e-3,)))]
    figure = plot(rows)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["1", "4", "8"]
    assert [text.get_text() for text in right.get_xticklabels()] == ["8", "16", "32"]
    assert len(left.containers) == len(right.containers) == len(METHODS)


def test_a_cell_is_trained_measured_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        f"""
        [model]
        statistics_prompts = 2
        [network]
        width = 16
        layers = 1
        [objective]
        reward_weight = 0
        preference_batch = 4
        [optim]
        steps = 2
        bf16 = false
        [data]
        scenes = 16
        cache = "{(ROOT / "build" / "tiny").as_posix()}"
        """,
        encoding="utf-8",
    )
    options = Options(
        methods=("static", "S"), ranks=(1,), palettes=(2,), rates=(1e-3,), prompts=12, sampling_steps=2,
        recipe=recipe, out=tmp_path / "runs", results=tmp_path / "found.json",
    )  # fmt: skip
    main(options)
    found = json.loads(options.results.read_text(encoding="utf-8"))
    assert [(one["method"], one["steps"], one["corrections"]) for one in found["cells"]] == [
        ("static", 2, 16), ("S", 2, 16),
    ]  # fmt: skip
    assert all({"gain", "low", "high"} <= set(one["metrics"]["geneval"]) for one in found["cells"])
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert "| corrections | rank | method |" in capsys.readouterr().out
    kept = sorted(path.name for path in options.out.iterdir())
    assert kept == ["S-rank1-palettes2-lr0.001", "static-rank1-palettes2-lr0.001"]
    for folder in options.out.iterdir():  # what was measured is not trained again
        (folder / "hypernetwork.safetensors").unlink()
    main(options)
    assert json.loads(options.results.read_text(encoding="utf-8")) == found
