"""The paper's tables: rows, budgets, claims, and the command end to end on a few rows."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import table_execution, table_rates, table_times, tables
from benchmarks.table_claims import Claim, claims_of, contrast_of, verdict
from benchmarks.table_report import cell_text, metrics_of
from benchmarks.table_results import Result
from benchmarks.table_rows import ROWS, chosen_rows, steps_of
from benchmarks.table_runs import PROMPT_COUNT, Options, Run, entities, runs_of, write_prompts
from hyperalign.errors import HyperAlignError
from train import analyse, evaluate, generate, keytimes, train
from train.config import BaseName
from train.data.prompts import load_prompt_list, load_prompts
from train.evaluation.table import DIVERSITY, IMAGE_WEIGHTED, TASK_MEAN, Metric, column
from train.generation.entities import read_entities
from train.generation.run import Draw, Job, Plan
from train.methods.passes import step_passes

COMMANDS = {
    "train.py": train.main, "generate.py": generate.main, "evaluate.py": evaluate.main,
    "keytimes.py": keytimes.main, "analyse.py": analyse.main,
}  # fmt: skip
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "tables"
TITLES = {row.key: row.title for row in ROWS}


def test_the_base_model_comes_first_and_the_rest_in_the_tables_order() -> None:
    assert [row.key for row in chosen_rows(("hyperalign-s", "best-of-n"))] == [
        "base",
        "best-of-n",
        "hyperalign-s",
    ]
    assert chosen_rows(()) == list(ROWS)
    with pytest.raises(HyperAlignError, match="There is no row dpoo; expected some of base, best-of-n"):
        chosen_rows(("dpoo",))


def test_trainings_of_one_budget_take_as_many_passes(tmp_path: Path) -> None:
    options = Options(out=tmp_path, rows=("static", "hyperalign-s", "s-reward-only"), seeds=(0,))
    spent = {
        run.row.key: step_passes(run.config).of_backbone(True).times(run.steps).total
        for run in runs_of(options)
        if run.steps
    }
    assert set(spent) == {"static", "hyperalign-s", "s-reward-only"}
    assert all(abs(passes / options.budget - 1) < 0.02 for passes in spent.values())


@pytest.mark.parametrize("base", ["tiny", "sd15", "flux"])
def test_rows_of_table_3_are_hyperalign_s_with_one_of_its_losses(base: BaseName) -> None:
    weights = {
        row.key: (
            config.network.conditioning,
            config.objective.reward_weight > 0,
            config.objective.preference_weight,
        )
        for row in chosen_rows(("hyperalign-s", "s-preference-only", "s-reward-only"))
        if row.recipe and (config := row.config(base))
    }
    assert weights == {
        "hyperalign-s": ("full", True, 1.0),
        "s-preference-only": ("full", False, 1.0),
        "s-reward-only": ("full", True, 0.0),
    }


def test_spo_is_trained_with_a_preference_model_that_is_made_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_of(Options(out=tmp_path, rows=("spo", "dpo"), seeds=(0, 1)))
    made = list[Sequence[str]]()
    monkeypatch.setattr(table_execution, "execute", lambda command, log, jobs=1: made.append(command))
    table_execution.prepare(runs[0].options, runs)
    ((_, script, *arguments),) = made
    assert Path(script).name == "step_reward.py"
    model = arguments[arguments.index("--out") + 1]
    by_row = {run.row.key: run.training() for run in runs if run.steps}
    assert by_row["spo"][by_row["spo"].index("--spo.step-reward") + 1] == model
    assert "--spo.step-reward" not in by_row["dpo"]
    Path(model).parent.mkdir(parents=True)
    Path(model).touch()
    table_execution.prepare(runs[0].options, runs)  # it is there
    assert len(made) == 1


def test_spos_preference_model_is_counted_until_it_is_there(tmp_path: Path) -> None:
    runs = runs_of(Options(out=tmp_path, rows=("spo",), seeds=(0,)))
    ((model, run),) = table_execution.preference_models(runs).items()
    assert run.preparation_passes(model, cfg=True) == 2 * 2 * 16 * 300
    model.parent.mkdir(parents=True)
    model.touch()
    assert not table_execution.preference_models(runs)


def test_a_row_is_timed_once_by_the_first_of_its_runs_that_was_trained_here(tmp_path: Path) -> None:
    runs = runs_of(Options(out=tmp_path, rows=("freedom", "static", "dpo", "sft"), seeds=(0, 1)))
    named = {(run.row.key, run.seed): run for run in runs}
    for key, seed in (("dpo", 1), ("static", 0), ("static", 1)):
        named[key, seed].hypernetwork.parent.mkdir(parents=True)
        named[key, seed].hypernetwork.touch()

    def kept(run: Run, times: list[float]) -> Result:
        return Result(run.name, {}, {}, 1.0, times, {})

    results = {run.name: kept(run, []) for run in runs}
    expected = [named["freedom", 0], named["dpo", 1], named["static", 0]]
    assert table_times.untimed(runs, results) == expected
    timed = results | {run.name: kept(run, [1.1]) for run in (named["freedom", 0], named["static", 1])}
    assert table_times.untimed(runs, timed) == [named["dpo", 1]]


def test_an_image_is_timed_right_after_one_of_the_base_model_on_the_same_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_times, "ROUNDS", 2)
    options = Options(out=tmp_path, rows=("freedom", "das"), prompt_count=2, sampling_steps=4)
    write_prompts(options)
    base, das, freedom = runs_of(options)
    drawn = list[tuple[str, int]]()
    open_method = table_times.drawing

    def watched(plan: Plan, device: torch.device) -> Draw:
        draw = open_method(plan, device)

        def one(jobs: Sequence[Job]) -> torch.Tensor:
            drawn.extend((plan.settings.method, job.prompt) for job in jobs)
            return draw(jobs)

        return one

    monkeypatch.setattr(table_times, "drawing", watched)
    found = list(table_times.image_times(base, [das, freedom]))
    assert [run for run, _ in found] == [das, freedom]
    assert [len(times) for _, times in found] == [2, 2]
    assert min(found[0][1]) > 1.2  # four particles, each with a backward pass
    prompts = (0, 1, 0)
    assert drawn == [
        (name, prompt) for row in ("das", "freedom") for prompt in prompts for name in ("base", row)
    ]


def test_dymo_is_told_the_entities_of_the_embedded_models_prompts(tmp_path: Path) -> None:
    options = Options(out=tmp_path, rows=("dymo", "das"))
    prompts = write_prompts(options)
    by_row = {run.row.key: run.sampling(prompts, tmp_path) for run in runs_of(options)}
    path = Path(by_row["dymo"][by_row["dymo"].index("--dymo.entities") + 1])
    texts = load_prompts(prompts)
    assert set(read_entities(path, texts)) == set(texts)
    assert entities("an icon of a red heart and an orange circle") == [["heart", "red"], ["circle", "orange"]]
    assert entities("three purple squares") == [["squares", "purple"]]
    assert not any(part.startswith("--dymo") for part in by_row["das"])


def test_without_a_budget_a_recipe_keeps_its_steps(tmp_path: Path) -> None:
    config = chosen_rows(("static",))[1].config("tiny")
    assert steps_of(config, 0.0, cfg=True) == config.optim.steps
    with pytest.raises(HyperAlignError, match="--budget is 10 passes, and one step of hyperalign takes"):
        steps_of(config, 10.0, cfg=True)


def test_a_row_without_recipe_for_a_base_model_is_one_sentence() -> None:
    with pytest.raises(HyperAlignError, match="has no recipe for nothing: .*Leave static out of --rows"):
        base: Any = "nothing"
        chosen_rows(("static",))[1].config(base)


GENEVAL = (
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
)


@pytest.mark.parametrize(("count", "kept"), [(0, 3), (2, 2)])
def test_what_genevals_list_says_of_its_prompts_stays_with_them(
    tmp_path: Path, count: int, kept: int
) -> None:
    path = tmp_path / "geneval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL), encoding="utf-8")
    written = write_prompts(Options(out=tmp_path / "T", base="sd15", prompts=path, prompt_count=count))
    assert load_prompt_list(written) == list(GENEVAL[:kept])


@pytest.mark.parametrize(
    "wrong",
    [{"seeds": ()}, {"jobs": 0}, {"images_per_prompt": 0}, {"sampling_steps": 3}, {"prompt_count": -1}],
)
def test_options_out_of_range_are_one_sentence(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(
        HyperAlignError, match="4 or more sampling steps, 1 or more jobs and images, and no negative count"
    ):
        runs_of(Options(out=tmp_path, **wrong))


def sets_of(name: str, **rows: Sequence[float]) -> Metric:
    """Returns a metric of rows, whose names have _ for -."""
    return Metric(name, {key.replace("_", "-"): np.array(values) for key, values in rows.items()})


def claims_by_text(
    metrics: Sequence[Metric], by_seed: Mapping[str, Mapping[str, Sequence[float]]] | None = None
) -> dict[str, Claim]:
    """Returns the claims about one metric by their text."""
    return {claim.text: claim for claim in claims_of(metrics, by_seed or {}, TITLES, "reward")}


@pytest.mark.parametrize(
    ("ours", "said"),
    [([0.9, 0.8, 0.85], "confirmed"), ([0.1, 0.2, 0.15], "refuted"), ([0.4, 0.6, 0.5], "undecided")],
)
def test_a_claim_holds_where_its_interval_is_above_zero(ours: list[float], said: str) -> None:
    geneval = sets_of(TASK_MEAN, base=[0.5] * 3, hyperalign_s=ours, s_reward_only=[0.5, 0.5, 0.5])
    found = claims_by_text([geneval])
    assert found["Table 3: reward alone loses held-out figures"].verdict == said
    assert (
        "HyperAlign-S less S, reward only" in found["Table 3: reward alone loses held-out figures"].measured
    )
    assert found["Table 3: reward alone falls below the base model there"].verdict == "undecided"


def test_claims_about_quality_are_measured_by_every_held_out_figure() -> None:
    rows: dict[str, list[float]] = {"base": [0.5] * 3, "hyperalign_s": [0.9, 0.8, 0.85]}
    names = ("reward", "other reward", TASK_MEAN, "two object", DIVERSITY)
    found = claims_of([sets_of(name, **rows) for name in names], {}, TITLES, "reward")
    beats = [claim.measured for claim in found if claim.text.endswith("HyperAlign-S beats the base model")]
    assert [said.split(",")[0] for said in beats] == ["other reward", TASK_MEAN]


def test_the_strongest_rival_is_the_one_that_counts() -> None:
    geneval = sets_of(TASK_MEAN, base=[0.1] * 3, hyperalign_s=[0.5] * 3, dpo=[0.6, 0.61, 0.62], kto=[0.2] * 3)
    found = claims_by_text([geneval])["Tables 1, 2, 4: HyperAlign-S beats every other trained method"]
    assert (found.verdict, "Diffusion-DPO" in found.measured) == ("refuted", True)


def test_diversity_is_kept_where_it_is_above_nine_tenths_of_the_base_models() -> None:
    diversity = sets_of(
        DIVERSITY, base=[1.0, 1.0, 1.1], hyperalign_s=[0.95, 0.97, 1.0], dance_grpo=[0.5, 0.4, 0.6]
    )
    found = {claim.text: claim.verdict for claim in claims_of([diversity], {}, TITLES, "reward")}
    assert found == {
        "Figure 12: group methods lose diversity": "confirmed",
        "Figure 12: HyperAlign keeps diversity": "confirmed",
    }
    assert verdict(contrast_of(diversity, {"hyperalign-s": 1, "base": -1})) == "refuted"


def test_preferred_images_alone_are_compared_with_half_of_the_gain_of_each_seed() -> None:
    geneval = sets_of(TASK_MEAN, base=[0.1] * 3, hyperalign_s=[0.5] * 3, s_preference_only=[0.2, 0.25, 0.22])
    by_seed = {TASK_MEAN: {"base": [0.1], "hyperalign-s": [0.4, 0.6], "s-preference-only": [0.2, 0.25]}}
    found = claims_by_text([geneval], by_seed)
    half = found["Table 3: preferred images alone bring less than half of the gain"]
    assert (half.verdict, found["Table 3: reward adds to preferred images"].verdict) == (
        "confirmed",
        "confirmed",
    )
    assert "0.5 x HyperAlign-S + 0.5 x base model less S, preferred images only: +0.077 [" in half.measured
    assert half.measured.endswith("]; by seed +0.050, +0.100")


def test_geneval_is_the_mean_of_families_and_a_cell_says_its_difference() -> None:
    scores = {IMAGE_WEIGHTED: {"base": np.zeros(4), "s": np.array([1.0, 1.0, 1.0, 0.0])}}
    overall, one, two = metrics_of(scores, ["one", "two", "one", "two"])
    assert (overall.value("s"), one.value("s"), two.value("s")) == (0.75, 1.0, 0.5)
    assert cell_text(column(one).cells["s"]) == "**1.000** (+1.000 [+1.000, +1.000]*)"
    assert cell_text(column(one).cells["base"]) == "0.000"


def test_a_command_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no such file'); sys.exit(3)"]
    with pytest.raises(HyperAlignError, match="ended with 3: no such file\nIts output is in .*one.log"):
        table_execution.execute(command, tmp_path / "logs" / "one.log")


def check_parts_give_the_same_report(options: Options) -> None:
    """Takes the lines of two parts and the figures of one to another machine, where nothing is made again."""
    report = json.loads((options.out / "report.json").read_text(encoding="utf-8"))
    elsewhere = options.out / "elsewhere"
    elsewhere.mkdir()
    lines = (options.out / "runs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (elsewhere / "runs.jsonl").write_text("".join(lines[3:] + lines[:3]), encoding="utf-8")
    shutil.copyfile(options.out / "figure_4.png", elsewhere / "figure_4.png")
    joined = dataclasses.replace(options, out=elsewhere)
    tables.main(joined)
    assert json.loads((elsewhere / "report.json").read_text(encoding="utf-8")) == report
    text = (elsewhere / "report.md").read_text(encoding="utf-8")
    assert "(figure_4.png)" in text
    assert "(figure_8.png)" not in text  # its hypernetwork was trained elsewhere
    with pytest.raises(
        HyperAlignError, match=r"line 1: .* was run with {'sampling steps': 4}; found {.*: 5}"
    ):
        tables.main(dataclasses.replace(joined, sampling_steps=5))
    (elsewhere / "runs.jsonl").write_text('{"name": "base"}', encoding="utf-8")
    with pytest.raises(HyperAlignError, match=r"runs.jsonl, line 1: .* missing .* Delete the line"):
        tables.main(joined)


def test_a_few_rows_are_trained_sampled_scored_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    executed: list[str] = []

    def here(command: Sequence[str], log: Path, jobs: int = 1) -> None:
        """Runs a command in this process: starting one takes longer than its work."""
        script = Path(command[1]).name
        executed.append(script)
        assert COMMANDS[script](list(command[2:])) == 0

    monkeypatch.setattr(tables, "execute", here)
    monkeypatch.setattr(table_execution, "execute", here)
    monkeypatch.setattr(table_times, "ROUNDS", 1)
    options = Options(
        out=tmp_path, rows=("best-of-n", "hyperalign-s", "s-reward-only"), seeds=(0, 1), budget=32.0,
        prompt_count=6, sampling_steps=4,
        training=("--objective.prompt-batch", "2", "--objective.preference-batch", "2", "--data.scenes", "16",
                  "--model.statistics-prompts", "2"),
        sampling=("--search.candidates", "2"),
    )  # fmt: skip
    tables.main(options)
    assert executed.count("train.py") == 4
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(report["rows"]) == ["base", "best-of-n", "hyperalign-s", "s-reward-only"]
    ours = report["rows"]["hyperalign-s"]
    assert all(len(metric["by_seed"]) == 2 for metric in ours["metrics"].values())
    assert report["rows"]["base"]["metrics"][TASK_MEAN]["by_seed"] == [
        report["rows"]["base"]["metrics"][TASK_MEAN]["value"]
    ]
    assert ours["time"] == pytest.approx(ours["times"][0])
    assert report["rows"]["base"]["times"] == [1.0]
    assert ours["training_passes"][0] > ours["training_passes"][1] > 0
    assert report["rows"]["best-of-n"]["image_passes"] == [2 * 4 * 2, 0]
    assert {"tiny reward", "tiny validation reward", TASK_MEAN, DIVERSITY} <= set(ours["metrics"])
    assert any(claim["text"].startswith("Table 3") for claim in report["claims"])
    for name in ("figure_4", "figure_8", "figure_9", "figure_12", "geneval_time", "geneval_diversity"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## Tables 1 and 2: rewards and time" in text
    assert "## Table 3: what each loss gives" in text
    assert "(figure_12.png)" in text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 6
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        assert {row["row"] for row in csv.DictReader(file)} == {TITLES[key] for key in report["rows"]}
    assert "4 trainings and 6 sets of images: about" in capsys.readouterr().out
    executed.clear()
    tables.main(options)  # everything is there
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    check_parts_give_the_same_report(options)
    assert not executed


@pytest.mark.skipif(not (COMMITTED / "runs.jsonl").is_file(), reason="The tables have not been run.")
def test_the_committed_report_is_that_of_the_committed_results(tmp_path: Path) -> None:
    report = json.loads((COMMITTED / "report.json").read_text(encoding="utf-8"))
    shutil.copytree(COMMITTED, tmp_path, dirs_exist_ok=True)
    options = Options(out=tmp_path, rows=tuple(report["rows"]), seeds=tuple(report["setting"]["seeds"]))
    tables.main(options)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == (COMMITTED / "report.md").read_text(
        encoding="utf-8"
    )


def test_rows_are_trained_at_several_rates_on_prompts_that_the_tables_do_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[str] = []

    def here(command: Sequence[str], log: Path, jobs: int = 1) -> None:
        script = Path(command[1]).name
        rates.extend(command[at + 1] for at, part in enumerate(command) if part == "--optim.lr")
        assert COMMANDS[script](list(command[2:])) == 0

    monkeypatch.setattr(table_execution, "execute", here)
    options = table_rates.Rates(
        out=tmp_path, rows=("sft",), rates=(1e-4, 3e-4), budget=32.0, prompt_count=4, images_per_prompt=1,
        sampling_steps=4, training=("--objective.preference-batch", "2", "--data.scenes", "16",
                                    "--model.statistics-prompts", "2"),
    )  # fmt: skip
    table_rates.main(options)
    assert rates == ["0.0001", "0.0003"]
    tuned = (tmp_path / "prompts.txt").read_text(encoding="utf-8").splitlines()
    own = load_prompts(write_prompts(Options(out=tmp_path / "tables")))
    assert len(own) == PROMPT_COUNT
    assert len(tuned) == 4
    assert not {*tuned} & {*own}
    found = json.loads((tmp_path / "rates.json").read_text(encoding="utf-8"))
    first, second = (name for name in found if name != "base")
    assert (first.split(" at ")[1], second.split(" at ")[1]) == ("0.0001", "0.0003")
    best = max((first, second), key=lambda name: found[name]["tiny validation reward"])
    assert f"| **{best}** |" in (tmp_path / "rates.md").read_text(encoding="utf-8")
    with pytest.raises(
        HyperAlignError, match=r"Found --base sd15, --prompts \. and .*; expected tiny, no list"
    ):
        table_rates.main(dataclasses.replace(options, base="sd15"))
