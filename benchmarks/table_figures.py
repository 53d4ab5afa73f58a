"""The figures of benchmarks.tables: the paper's 4, 8, 9 and 12 by their commands, and plots of the rows."""

from __future__ import annotations

import base64
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import figure as matplotlib_figure
from matplotlib.ticker import LogLocator

from benchmarks.table_runs import ROOT, Options, Run, base_row
from train.analysis.plots import save
from train.evaluation.table import DIVERSITY, TASK_MEAN, Metric

DIVERSE = ("dance-grpo", "mix-grpo", "hyperalign-s")
"""The rows of Figure 12, besides the base model."""
Execute = Callable[[Sequence[str], str], None]
"""Runs a command; its second argument names its log."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the report."""

    title: str
    path: Path

    @property
    def uri(self) -> str:
        """Returns the picture for a page that needs no other file."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


def paper_figures(options: Options, runs: Sequence[Run], prompts: Path, execute: Execute) -> list[Figure]:
    """Draws the paper's figures whose hypernetworks are there; what is drawn already is not drawn again."""
    first = {run.row.key: run for run in reversed(runs) if run.steps}
    folder, steps, found = options.out / "figures", str(options.sampling_steps), list[Figure]()
    recipe = ["--recipe", str(base_row().recipe_path(options.base)), "--steps", steps]
    listed = ["--prompts", str(prompts), "--out", str(folder)]

    def draw(
        script: str, arguments: Sequence[str], made: Mapping[str, str], hypernetworks: Sequence[Path] = ()
    ) -> None:
        """Runs a command unless its figures are there; `made` are their files with their titles."""
        paths = {
            name: options.out / f"figure_{title.split(':')[0].split()[-1]}.png"
            for name, title in made.items()
        }
        if not all(path.is_file() for path in paths.values()):
            if not all(path.is_file() for path in hypernetworks):
                return  # they were trained on another machine
            execute([sys.executable, str(ROOT / "train" / script), *arguments], Path(script).stem)
            for name, path in paths.items():
                shutil.copyfile(folder / name, path)
        found.extend(Figure(made[name], path) for name, path in paths.items())

    draw(
        "keytimes.py", [*recipe, "--prompts", "16", "--out", str(folder / "keytimes")],
        {"keytimes.png": "Figure 4: relative distance of one-step predictions"},
    )  # fmt: skip
    if ours := first.get("hyperalign-s"):
        draw(
            "analyse.py", ["weights", *recipe, "--hypernetwork", str(ours.hypernetwork), *listed],
            {"dynamics.png": "Figure 8: weights by step", "variation.png": "Figure 9: weights of prompts"},
            [ours.hypernetwork],
        )  # fmt: skip
    if diverse := [first[row].hypernetwork for row in DIVERSE if row in first]:
        draw(
            "analyse.py", ["diversity", *recipe, "--hypernetworks", *map(str, diverse), *listed],
            {"diversity.png": "Figure 12: images of one prompt"}, diverse,
        )  # fmt: skip
    return found


def row_plots(
    metrics: Sequence[Metric], titles: Mapping[str, str], times: Mapping[str, float | None], folder: Path
) -> list[Figure]:
    """Draws GenEval against the time of an image and against diversity."""
    by_name = {metric.name: metric for metric in metrics}
    if TASK_MEAN not in by_name:
        return []
    geneval = by_name[TASK_MEAN]
    found = [
        _plot(geneval, titles, times, "time of an image, over the base model's", folder / "geneval_time.png")
    ]
    if diversity := by_name.get(DIVERSITY):
        values = {row: diversity.value(row) for row in diversity.prompts}
        found.append(_plot(geneval, titles, values, "diversity", folder / "geneval_diversity.png"))
    return found


def _plot(
    metric: Metric, titles: Mapping[str, str], across: Mapping[str, float | None], label: str, path: Path
) -> Figure:
    drawn = matplotlib_figure.Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = drawn.add_subplot()
    for number, row in enumerate(metric.prompts, 1):
        if (x := across.get(row)) is not None:
            axes.plot(
                x, metric.value(row), marker=f"${number}$", markersize=7 if number < 10 else 9, linestyle="",
                color="C3" if row.startswith("hyperalign") else "C0", label=titles[row],
            )  # fmt: skip
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    if max((x for x in across.values() if x is not None), default=1.0) > 4.0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(label)
    axes.set_ylabel(metric.name)
    axes.grid(alpha=0.3)
    save(drawn, path)
    return Figure(f"{metric.name} and {label}", path)
