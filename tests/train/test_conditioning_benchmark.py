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
    config_of,
    final_cells,
    main,
    middle_cells,
    outer_cells,
)
from benchmarks.conditioning_report import METRICS, best, curve_of, gain, plot, report_of, tables
from benchmarks.one_prompt import OraclePlan
from hyperalign.families.unet import TINY
from train.recipe import load_recipe
from train.start import trained_numbers

ROOT = Path(__file__).parents[2]
RECIPE = load_recipe(ROOT / "train" / "recipes" / "tiny_s.toml")


def equal(*scores: float) -> dict[str, list[float]]:
    """Returns the same scores in every figure."""
    return {name: list(scores) for name in METRICS}


def row(cell: Cell, *scores: float, base: float = 0.25) -> dict[str, Any]:
    """Returns a cell's row; one score a prompt, prompts of two families in turn."""
    own, other = equal(*scores), equal(*[base] * len(scores))
    families = [list(range(start, len(scores), 2)) for start in (0, 1)]
    return {
        "method": cell.method, "rank": cell.rank, "palettes": cell.palettes, "rate": cell.rate,
        "steps": cell.steps, "seed": cell.seed, "corrections": 8 * cell.palettes, "trained_numbers": 123_456,
        "scores": own, "base": other, "strata": {"geneval": families}, "curve": [],
    }  # fmt: skip


def cell(method: Any, rank: int = 4, palettes: int = 2, rate: float = 1e-3, seed: int = 0) -> Cell:
    return Cell(method, rank, palettes, rate, 5, seed)


def test_controls_try_their_rates_in_the_middle_and_the_best_goes_on() -> None:
    decoder = middle_cells(Options(methods=("decoder without conditioning",), decoder_rates=(4e-4,)), 3e-3)
    assert [one.rate for one in decoder] == [4e-4]
    options = Options(methods=("static", "S"), rank_methods=("S",), rates=(1e-3, 2e-3))
    tried = list(middle_cells(options, 3e-3))
    rates = [(one.method, one.rate) for one in tried]
    assert rates == [("static", 1e-3), ("static", 2e-3), ("S", 3e-3)]
    assert {(one.rank, one.palettes) for one in tried} == {(4, 2)}
    found = list(outer_cells(options, {"static": 2e-3, "S": 1e-3}))
    assert [(one.method, one.rank, one.palettes, one.rate) for one in found] == [
        ("static", 4, 1, 2e-3), ("S", 4, 1, 1e-3), ("static", 4, 4, 2e-3), ("S", 4, 4, 1e-3),
        ("S", 1, 2, 1e-3), ("S", 8, 2, 1e-3),
    ]  # fmt: skip
    fewer = Options(methods=("static", "S"), palette_methods=("S",), rank_methods=())
    assert {one.method for one in outer_cells(fewer, {"static": 2e-3, "S": 1e-3})} == {"S"}
    finals = list(final_cells(Options(seeds=(0, 5), long_steps=20), {"static": 2e-3, "S": 1e-3}, 9))
    assert [(one.method, one.seed, one.steps, one.rate) for one in finals] == [
        ("static", 0, 9, 2e-3), ("S", 0, 9, 1e-3), ("static", 5, 9, 2e-3), ("S", 5, 9, 1e-3),
        ("static", 0, 20, 2e-3), ("S", 0, 20, 1e-3),
    ]  # fmt: skip
    every = [*tried, *found, *finals]
    assert len({one.name for one in every}) == len(every)


@pytest.mark.parametrize("method", METHODS)
def test_a_cell_changes_the_recipe_where_its_method_says(method: Any, tmp_path: Path) -> None:
    found = config_of(Cell(method, 2, 1, 3e-3, 7, seed=4), RECIPE, tmp_path)
    assert (found.network.rank, found.optim.lr, found.optim.steps, found.run.seed) == (2, 3e-3, 7, 4)
    assert found.validation.every == 0
    assert found.data.wordings == ("an icon of {}",)
    assert found.model.variant == (method if method in ("I", "P", "S") else "S")
    expected = {"static": "none", "static, as large as S": "none", "decoder without conditioning": "constant"}
    assert found.network.conditioning == expected.get(method, "full")


def test_the_large_static_lora_has_as_many_trained_numbers_as_the_hypernetwork(tmp_path: Path) -> None:
    sizes = {method: trained_numbers(config_of(cell(method), RECIPE, tmp_path), TINY) for method in METHODS}
    assert sizes["S"] <= sizes["static, as large as S"] < 1.05 * sizes["S"]
    assert sizes["static"] < 0.5 * sizes["S"]


def test_each_method_counts_at_its_best_learning_rate() -> None:
    rows = [row(cell("S", rate=rate), *scores) for rate, scores in ((1e-3, [0.1] * 4), (2e-3, [0.3] * 4))]
    rows += [row(cell("static"), 0.0, 0.0, 0.0, 0.0)]
    assert [one["rate"] for one in best(rows)] == [2e-3, 1e-3]


def test_gains_are_paired_over_prompts_and_geneval_is_the_mean_of_its_families() -> None:
    s, static = row(cell("S"), 0.5, 1.0, 0.75, 1.0, 1.0), row(cell("static"), 0.25, 0.5, 0.5, 0.5, 0.75)
    found = {one["method"]: one for one in report_of([s, static], [], {})["cells"]}
    assert found["S"]["metrics"]["geneval"]["value"] == pytest.approx((0.75 + 1.0) / 2)
    assert found["S"]["metrics"]["validation_reward"]["value"] == pytest.approx(0.85)
    assert found["static"]["metrics"]["geneval"]["gain"] == pytest.approx(0.25)
    above = found["static"]["gain_of_s"]["validation_reward"]
    assert above["gain"] == pytest.approx(0.35)
    assert 0.25 <= above["low"] <= above["gain"] <= above["high"] <= 0.5
    assert "gain_of_s" not in found["S"]
    assert not {"scores", "base", "strata"} & set(found["S"])


def test_a_finalist_is_the_mean_of_its_seeds() -> None:
    rows = [row(cell("S", seed=seed), *scores) for seed, scores in ((0, [0.0, 0.5] * 2), (1, [1.0] * 4))]
    (found,) = report_of([], rows, equal(1.0, 1.0))["finalists"]
    assert found["of_seeds"] == [0.25, 1.0]
    assert found["metrics"]["geneval"]["value"] == pytest.approx(0.625)
    assert found["seed"] == [0, 1]


def test_finalists_are_compared_with_s_of_as_many_steps() -> None:
    found = [row(cell("static"), *[0.2] * 4), row(cell("S"), *[0.5] * 4)]
    longer = [{**one, "steps": 9, "scores": equal(*[0.6] * 4)} for one in found]
    finalists = report_of([], [*found, *longer], equal(1.0, 1.0))["finalists"]
    gains = {(one["method"], one["steps"]): one.get("gain_of_s", {}).get("geneval", {}) for one in finalists}
    assert gains["static", 5]["gain"] == pytest.approx(0.3)
    assert gains["static", 9]["gain"] == pytest.approx(0.0)
    assert not gains["S", 5]


def test_the_oracle_is_compared_on_its_own_prompts() -> None:
    finals = [row(cell("S"), 0.5, 0.5, 9.0, 9.0), row(cell("static"), 0.25, 0.5, 9.0, 9.0)]
    found = report_of([], finals, equal(1.0, 0.75))["oracle"]
    values = {one["method"]: one["metrics"]["geneval"]["value"] for one in found}
    assert values == {"S, 5 steps": 0.5, "static, 5 steps": 0.375, "one LoRA a prompt": 0.875}
    assert {one["prompts"] for one in found} == {2}


def test_without_an_oracle_nothing_is_said_about_it() -> None:
    report = report_of([], [row(cell("S"), 0.5, 0.5)], {})
    assert report["oracle"] == []
    assert "oracle" not in tables(report)


def test_a_gain_is_bold_where_its_interval_excludes_zero() -> None:
    assert gain({"gain": 0.1, "low": 0.05, "high": 0.2}) == "**+0.100 [+0.050, +0.200]**"
    assert gain({"gain": 0.1, "low": -0.05, "high": 0.2}) == "+0.100 [-0.050, +0.200]"


def test_a_curve_begins_with_the_base_model(tmp_path: Path) -> None:
    figures = [{"geneval": {"overall": value}, "validation_reward": 10 * value} for value in (0.2, 0.3)]
    rows = [{"step": 0, "baseline": figures[0]}, {"step": 1}, {"step": 2, "validation": figures[1]}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert curve_of(tmp_path / "log.jsonl") == [
        {"step": 0, "geneval": 0.2, "validation_reward": 2.0},
        {"step": 3, "geneval": 0.3, "validation_reward": 3.0},
    ]


def test_the_figure_has_every_method_against_corrections_and_rank() -> None:
    options = Options(rates=(1e-3,))
    found = [*middle_cells(options, 1e-3), *outer_cells(options, dict.fromkeys(METHODS, 1e-3))]
    report = report_of([row(one, 0.1, 0.2, 0.3, 0.4) for one in found], [], {})
    upper = plot(report["cells"]).axes[:2]
    assert [text.get_text() for text in upper[0].get_xticklabels()] == ["8", "16", "32"]
    assert [text.get_text() for text in upper[1].get_xticklabels()] == ["1", "4", "8"]
    assert len(upper[0].containers) == len(upper[1].containers) == len(METHODS)


def test_the_figure_leaves_out_what_was_not_varied() -> None:
    options = Options(rates=(1e-3,), ranks=(4,), rank_methods=())
    found = [*middle_cells(options, 1e-3), *outer_cells(options, dict.fromkeys(METHODS, 1e-3))]
    panels = plot(report_of([row(one, 0.1, 0.2, 0.3, 0.4) for one in found], [], {})["cells"]).axes
    assert [panel.get_xlabel() for panel in panels] == ["corrections (rank 4)"] * 2


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
        [validation]
        every = 2
        prompt_count = 12
        steps = 2
        """,
        encoding="utf-8",
    )
    options = Options(
        methods=("static", "S"), ranks=(1,), palettes=(2,), rates=(1e-3,), steps=1, seeds=(0,), prompts=12,
        noises=1, sampling_steps=2, long_steps=0, oracle=OraclePlan(prompts=2, steps=1, batch=2, scenes=2),
        recipe=recipe, out=tmp_path / "runs", results=tmp_path / "found.json",
    )  # fmt: skip
    main(options)
    found = json.loads(options.results.read_text(encoding="utf-8"))
    cells = [(one["method"], one["steps"], one["corrections"]) for one in found["cells"]]
    assert cells == [("static", 1, 16), ("S", 1, 16)]
    finals = [
        (one["method"], one["steps"], [at["step"] for at in one["curve"][0]]) for one in found["finalists"]
    ]
    assert finals == [("static", 2, [0, 2]), ("S", 2, [0, 2])]
    compared = [one["method"] for one in found["oracle"]]
    assert compared == ["static, 2 steps", "S, 2 steps", "one LoRA a prompt"]
    assert all({"gain", "low", "high"} <= set(one["metrics"]["geneval"]) for one in found["cells"])
    for figure in ("found.png", "conditioning_curves.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| corrections | rank | method |" in printed
    assert "| one LoRA a prompt |" in printed
    assert sorted(path.name for path in (options.out / "oracle").iterdir()) == [
        "prompt00-lr0.002-steps1", "prompt01-lr0.002-steps1",
    ]  # fmt: skip
    for file in options.out.glob("**/hypernetwork.safetensors"):  # what was measured is not trained again
        file.unlink()
    main(options)
    assert json.loads(options.results.read_text(encoding="utf-8")) == found
