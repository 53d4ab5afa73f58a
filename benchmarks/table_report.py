"""The report of benchmarks.tables: rows averaged over their seeds, as Markdown, CSV, JSON and a page."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table_claims import Claim, claims_of
from benchmarks.table_figures import Figure
from benchmarks.table_results import Result, Scores, machine_text
from benchmarks.table_rows import Group
from benchmarks.table_runs import Options, Run, has_cfg
from benchmarks.table_times import ROUNDS, SECONDS
from hyperalign.files import write_text
from hyperalign.pages import render
from train.data.prompts import json_lines
from train.evaluation.table import (
    DIVERSITY,
    IMAGE_WEIGHTED,
    TASK_MEAN,
    Cell,
    Column,
    Metric,
    column,
)
from train.methods.passes import Passes, step_passes

TEMPLATE = Path(__file__).with_name("tables.html")
ABLATED = ("base", "hyperalign-s", "s-preference-only", "s-reward-only")
"""The rows of Table 3."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a row takes."""

    steps: int
    training: Passes
    training_seconds: float
    """Of one training, beside others; the mean over seeds."""
    image: Passes
    """Of one image."""
    times: list[float]
    """Of single images, as ratios to the base model's."""

    @property
    def time(self) -> float | None:
        """The median of the times."""
        return statistics.median(self.times) if self.times else None


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that the report says."""

    titles: dict[str, str]
    """By row."""
    groups: dict[str, Group]
    optimised: str
    """The reward that trainings raise."""
    metrics: list[Metric]
    """Their sets are the rows; one number a prompt, the mean over images and training seeds."""
    by_seed: dict[str, dict[str, list[float]]]
    """By metric and row, its value for each training; one value where a row is not trained."""
    costs: dict[str, Cost]
    setting: dict[str, Any]


def measured(options: Options, runs: Sequence[Run], results: Mapping[str, Result]) -> Measured:
    """Returns what the report says of runs, which all have results."""
    prompts = [row for _, row in json_lines(options.prompt_file)]
    tags = [row.get("tag", "") for row in prompts]
    rows = list(dict.fromkeys(run.row for run in runs))
    own = {row.key: [results[run.name] for run in runs if run.row == row] for row in rows}
    scores: Scores = {
        metric: {key: np.mean([one.scores[metric] for one in found], axis=0) for key, found in own.items()}
        for metric in next(iter(results.values())).scores
    }
    by_set: Scores = {
        metric: {one.name: np.array(one.scores[metric]) for found in own.values() for one in found}
        for metric in scores
    }
    by_seed = {
        metric.name: {key: [metric.value(one.name) for one in found] for key, found in own.items()}
        for metric in metrics_of(by_set, tags)
    }
    first = {row.key: next(run for run in runs if run.row == row) for row in rows}
    machines = [one.environment for found in own.values() for one in found]
    setting = {
        "base": options.base, "budget": options.budget, "seeds": list(options.seeds),
        "prompts": len(prompts), "images of each prompt": options.images_per_prompt,
        "sampling steps": options.sampling_steps,
        "machines": [one for n, one in enumerate(machines) if one not in machines[:n]],
    }  # fmt: skip
    return Measured(
        {row.key: row.title for row in rows}, {row.key: row.group for row in rows},
        next(iter(runs[0].config.objective.rewards)), metrics_of(scores, tags), by_seed,
        {key: cost_of(run, own[key]) for key, run in first.items()}, setting,
    )  # fmt: skip


def metrics_of(scores: Scores, tags: Sequence[str]) -> list[Metric]:
    """Returns the metrics in the tables' order: rewards, GenEval with its families, diversity."""
    found = [Metric(name, sets) for name, sets in scores.items() if name not in (IMAGE_WEIGHTED, DIVERSITY)]
    if shares := scores.get(IMAGE_WEIGHTED):
        families = {tag: [n for n, other in enumerate(tags) if other == tag] for tag in dict.fromkeys(tags)}
        found.append(Metric(TASK_MEAN, shares, list(families.values())))
        found += [Metric(tag.replace("_", " "), shares, [rows]) for tag, rows in families.items()]
    return found + ([Metric(DIVERSITY, scores[DIVERSITY])] if DIVERSITY in scores else [])


def cost_of(run: Run, results: Sequence[Result]) -> Cost:
    """Returns what a row takes, from the results of its seeds."""
    cfg = has_cfg(run.config)
    each = step_passes(run.config).of_backbone(cfg) if run.steps else Passes(0, 0)
    seconds = float(np.mean([result.training_seconds for result in results]))
    times = [1.0] if run.row.key == "base" else [time for result in results for time in result.times]
    return Cost(run.steps, each.times(run.steps), seconds, run.image_passes(cfg), times)


def write_report(found: Measured, figures: Sequence[Figure], folder: Path) -> str:
    """Writes all files; returns the report as Markdown."""
    claims = claims_of(found.metrics, found.by_seed, found.titles, found.optimised)
    sections = sections_of(found, claims)
    title = f"The paper's tables on {found.setting['base']}"
    text = markdown(title, setting_line(found), sections, figures)
    page = render(TEMPLATE, title=title, setting=setting_line(found), sections=sections, figures=figures)
    columns = [column(metric) for metric in found.metrics]
    rows = {key: summary_of(found, key, columns) for key in found.titles}
    summary = {
        "setting": found.setting,
        "rows": rows,
        "claims": [claim.as_json() for claim in claims],
    }
    write_text(folder / "report.md", text)
    write_text(folder / "report.csv", as_csv(rows.values()))
    write_text(folder / "report.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / "report.html", page)
    return text


def sections_of(found: Measured, claims: Sequence[Claim]) -> list[tuple[str, list[list[str]]]]:
    """Returns each table with its title."""
    names = [metric.name for metric in found.metrics]
    families = (
        [name for name in names[names.index(TASK_MEAN) :] if name != DIVERSITY] if TASK_MEAN in names else []
    )
    main = [name for name in names if name not in families[1:]]
    rows = [key for key, group in found.groups.items() if group != "Table 3"]
    sections = [("Tables 1 and 2: rewards and time", table_of(found, main, rows))]
    ablated = [key for key in ABLATED if key in found.titles]
    if len(ablated) > 2:
        sections.append(("Table 3: what each loss gives", table_of(found, main, ablated)))
    if families:
        sections.append(("Tables 4 and 5: GenEval", table_of(found, families, rows)))
    sections.append(("What each row takes", costs_table(found)))
    if claims:
        said = [[claim.text, claim.measured, claim.verdict] for claim in claims]
        sections.append(("What the paper claims", [["claim", "measured", "verdict"], *said]))
    return sections


def table_of(found: Measured, names: Sequence[str], rows: Sequence[str]) -> list[list[str]]:
    """Returns a table's cells: values in bold where they are best, with their differences to the base."""
    columns: list[Column] = []
    for name in names:
        metric = next(one for one in found.metrics if one.name == name)
        columns.append(column(Metric(name, {key: metric.prompts[key] for key in rows}, metric.strata)))
    table = [["", *(each.name for each in columns), "time"]]
    for key in rows:
        time = found.costs[key].time
        cells = [cell_text(each.cells[key]) for each in columns]
        table.append([found.titles[key], *cells, "" if time is None else f"{time:.2f}"])
    return table


def cell_text(cell: Cell | None) -> str:
    """Returns a value with its difference to the base and the interval; * where that excludes zero."""
    if cell is None:
        return ""
    text = f"**{cell.value:.3f}**" if cell.is_best else f"{cell.value:.3f}"
    if (found := cell.difference) is None:
        return text
    if found.interval is None:
        return f"{text} ({found.value:+.3f})"
    low, high = found.interval
    return f"{text} ({found.value:+.3f} [{low:+.3f}, {high:+.3f}]{'*' if found.is_significant else ''})"


def costs_table(found: Measured) -> list[list[str]]:
    """Returns what every row takes."""
    table = [["", "steps", "forward", "backward", "seconds", "GenEval by seed", "forward an image",
              "backward an image", "time an image"]]  # fmt: skip
    for key, cost in found.costs.items():
        trained = (
            [f"{cost.training.forwards:,.0f}", f"{cost.training.backwards:,.0f}"] if cost.steps else ["", ""]
        )
        table.append([
            found.titles[key], str(cost.steps or ""), *trained,
            f"{cost.training_seconds:,.0f}" if cost.steps else "",
            ", ".join(f"{value:.3f}" for value in found.by_seed.get(TASK_MEAN, {}).get(key, [])),
            f"{cost.image.forwards:,.0f}", f"{cost.image.backwards:,.0f}", time_text(cost),
        ])  # fmt: skip
    return table


def time_text(cost: Cost) -> str:
    """Returns the median of an image's times with the least and the greatest one."""
    if cost.time is None:
        return ""
    least, greatest = min(cost.times), max(cost.times)
    return f"{cost.time:.2f}" + (f" [{least:.2f}, {greatest:.2f}]" if len(cost.times) > 1 else "")


def setting_line(found: Measured) -> str:
    """Returns a sentence about how the rows were measured."""
    s = found.setting
    budget = f"a budget of {s['budget']:,.0f} passes" if s["budget"] else "their recipes' steps"
    machines = " / ".join(map(machine_text, s["machines"]))
    return (
        f"Base model {s['base']}; {s['prompts']} prompts x {s['images of each prompt']} images, "
        f"{s['sampling steps']} steps; trainings of {budget} from seeds {', '.join(map(str, s['seeds']))}. "
        f"In brackets the difference to the base model on the same prompts and noise with its 95 % bootstrap "
        "interval over prompts, * where that excludes zero; bold is the best of a column; time is that of an "
        f"image over the base model's, the median of as many as {SECONDS:.0f} s allow, {ROUNDS} at most; its "
        f"passes are the most it may take. {machines}."
    )


def markdown(
    title: str, setting: str, sections: Sequence[tuple[str, list[list[str]]]], figures: Sequence[Figure]
) -> str:
    """Returns the report as Markdown."""
    parts = [f"# {title}", setting]
    for heading, table in sections:
        parts += [f"## {heading}", markdown_table(table)]
    for figure in figures:
        parts += [f"## {figure.title}", f"![{figure.title}]({figure.path.name})"]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table whose first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary_of(found: Measured, key: str, columns: Sequence[Column]) -> dict[str, Any]:
    """Returns a row as JSON types, from the columns of all metrics."""
    cost = found.costs[key]
    metrics: dict[str, Any] = {}
    for each in columns:
        cell = each.cells[key]
        metrics[each.name] = {} if cell is None else values_of(cell)
        metrics[each.name]["by_seed"] = found.by_seed[each.name][key]
    return {
        "title": found.titles[key], "group": found.groups[key], "steps": cost.steps,
        "training_passes": [cost.training.forwards, cost.training.backwards],
        "training_seconds": cost.training_seconds,
        "image_passes": [cost.image.forwards, cost.image.backwards], "time": cost.time,
        "times": cost.times, "metrics": metrics,
    }  # fmt: skip


def values_of(cell: Cell) -> dict[str, float]:
    """Returns a cell's value, difference and interval."""
    values = {"value": cell.value}
    if cell.difference is not None:
        values["difference"] = cell.difference.value
        if cell.difference.interval is not None:
            values |= cell.difference.interval._asdict()
    return values


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns a line for each metric of rows from `summary_of`."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["row", "group", "metric", "value", "difference", "low", "high"])
    for row in rows:
        for name, values in row["metrics"].items():
            numbers = (values.get(part, "") for part in ("value", "difference", "low", "high"))
            writer.writerow([row["title"], row["group"], name, *numbers])
    return stream.getvalue()
