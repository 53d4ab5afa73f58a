"""When does conditioning pay: a static LoRA against I, P and S, by rank and by number of corrections.

    python -m benchmarks.conditioning                                       # hours on two cores; resumes
    python -m benchmarks.conditioning --methods static S --ranks 4 --palettes 2

Every cell is a training of the embedded model with the recipe tiny_s: equal steps, equal images. The number
of corrections is that of the palettes in its prompts times eight colours; with one palette there is nothing
that depends on the prompt. Trainings and measured cells are kept in --out; the same command goes on.
Writes results/conditioning_pays.json and the figure, and prints the table.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyperalign.checkpoint import HyperAlign, load
from hyperalign.families.unet import TINY
from hyperalign.files import write_text
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.tiny.prompts import PALETTES
from train.analysis.conditioning import Strata
from train.analysis.plots import save
from train.config import TrainConfig
from train.evaluation.table import Metric, Numbers
from train.inputs import load_inputs
from train.models.tiny import Tiny
from train.recipe import load_recipe
from train.start import trained_numbers
from train.tiny.evaluate import judged, sample_all
from train.trainer import Trainer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Method = Literal["static", "static, as large as S", "decoder without conditioning", "I", "P", "S"]
METHODS: tuple[Method, ...] = (
    "static", "static, as large as S", "decoder without conditioning", "I", "P", "S",
)  # fmt: skip
WORDINGS: dict[int, tuple[str, ...]] = {
    1: ("an icon of {}",),
    2: ("{}", "an icon of {}"),
    4: ("{}", *PALETTES),
}
"""By number of palettes, the wordings of a cell's prompts."""
CORRECTIONS = 8
"""Colours of a palette."""
METRICS = ("geneval", "validation_reward")


@dataclass(frozen=True, slots=True)
class Options:
    """Which cells are measured, and how."""

    methods: tuple[Method, ...] = METHODS
    ranks: tuple[int, ...] = (1, 4, 8)
    """At the middle number of palettes."""
    palettes: tuple[Literal[1, 2, 4], ...] = (1, 2, 4)
    """At the middle rank."""
    rates: tuple[float, ...] = (1e-3, 2e-3)
    """Learning rates; the best one by GenEval counts."""
    steps: int = 0
    """Training steps; 0 takes the recipe's."""
    prompts: int = 120
    """Validation prompts of each cell."""
    sampling_steps: int = 12
    recipe: Path = ROOT / "train" / "recipes" / "tiny_s.toml"
    out: Path = Path("runs/conditioning")
    """Folder of the trainings."""
    results: Path = RESULTS / "conditioning_pays.json"


@dataclass(frozen=True, slots=True)
class Cell:
    """One training."""

    method: Method
    rank: int
    palettes: int
    rate: float

    @property
    def name(self) -> str:
        """Its folder."""
        words = self.method.replace(",", "").replace(" ", "_")
        return f"{words}-rank{self.rank}-palettes{self.palettes}-lr{self.rate:g}"


def cells(options: Options) -> Iterator[Cell]:
    """Yields every cell: the ranks at the middle number of palettes, the palettes at the middle rank."""
    middle_rank = options.ranks[len(options.ranks) // 2]
    middle_palettes = options.palettes[len(options.palettes) // 2]
    places = [(rank, middle_palettes) for rank in options.ranks]
    places += [(middle_rank, count) for count in options.palettes if count != middle_palettes]
    for rank, count in places:
        for method in options.methods:
            yield from (Cell(method, rank, count, rate) for rate in options.rates)


def config_of(cell: Cell, recipe: TrainConfig, out: Path, steps: int = 0) -> TrainConfig:
    """Returns the recipe of a cell."""
    network = dataclasses.replace(recipe.network, rank=cell.rank)
    if cell.method == "static":
        network = dataclasses.replace(network, conditioning="none")
    elif cell.method == "decoder without conditioning":
        network = dataclasses.replace(network, conditioning="constant")
    elif cell.method == "static, as large as S":
        network = as_large(network, recipe)
    variant = cell.method if cell.method in ("I", "P", "S") else "S"
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, variant=variant),
        network=network,
        optim=dataclasses.replace(recipe.optim, lr=cell.rate, steps=steps or recipe.optim.steps),
        data=dataclasses.replace(recipe.data, wordings=WORDINGS[cell.palettes]),
        validation=dataclasses.replace(recipe.validation, every=0),
        run=dataclasses.replace(recipe.run, out=out / cell.name),
    )


def as_large(network: HyperNetworkConfig, recipe: TrainConfig) -> HyperNetworkConfig:
    """Returns the static LoRA that has at least as many trained numbers as the recipe's hypernetwork."""

    def numbers(sizes: HyperNetworkConfig) -> int:
        return trained_numbers(dataclasses.replace(recipe, network=sizes), TINY)

    static, wanted = dataclasses.replace(network, conditioning="none"), numbers(network)
    while numbers(static) < wanted:
        static = dataclasses.replace(static, a=static.a + 4, b=static.b + 4)
    return static


def trained(config: TrainConfig) -> HyperAlign:
    """Trains a cell, or goes on with its training; returns the hypernetwork."""
    path = config.run.out / "hypernetwork.safetensors"
    if not path.exists():
        accelerator = Accelerator(cpu=True)
        trainer = Trainer(config, load_inputs(config, accelerator), accelerator)
        trainer.fit()
        path = trainer.path
    return load(path)


def judged_images(
    base: Tiny, hyperalign: HyperAlign | None, wordings: Sequence[str], options: Options
) -> tuple[dict[str, Numbers], Strata]:
    """Returns the figures of each validation prompt of some wordings, and GenEval's families."""
    images = sample_all(
        base, hyperalign, options.prompts, seeds=(0,), steps=options.sampling_steps, guidance_scale=4.0,
        wordings=wordings,
    )  # fmt: skip
    judge, strata = judged(images.contents)
    return dict(judge(images)), strata


def gains(own: dict[str, Numbers], base: dict[str, Numbers], strata: Strata) -> dict[str, Any]:
    """Returns by metric the value and the paired difference to the base with its 95 % interval."""
    found: dict[str, Any] = {}
    for name in METRICS:
        metric = Metric(name, {"own": own[name], "base": base[name]}, strata.get(name, ()))
        difference = metric.difference("own", "base")
        interval = {} if difference.interval is None else difference.interval._asdict()
        found[name] = {"value": metric.value("own"), "gain": difference.value, **interval}
    return found


def measure(options: Options) -> list[dict[str, Any]]:
    """Trains and measures every cell; a cell that was measured is read from its folder."""
    base, recipe = Tiny(load_tiny()), load_recipe(options.recipe)
    of_base: dict[int, tuple[dict[str, Numbers], Strata]] = {}
    rows: list[dict[str, Any]] = []
    for cell in cells(options):
        config = config_of(cell, recipe, options.out, options.steps)
        kept = config.run.out / f"measured-{options.prompts}-{options.sampling_steps}.json"
        if not kept.exists():
            hyperalign, wordings = trained(config), WORDINGS[cell.palettes]
            if cell.palettes not in of_base:
                of_base[cell.palettes] = judged_images(base, None, wordings, options)
            values, strata = of_base[cell.palettes]
            own, _ = judged_images(base, hyperalign, wordings, options)
            row = asdict(cell) | {
                "corrections": CORRECTIONS * cell.palettes,
                "steps": config.optim.steps,
                "trained_numbers": trained_numbers(config, TINY),
                "metrics": gains(own, values, strata),
            }
            write_text(kept, json.dumps(row, indent=1) + "\n")
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
        print(line(rows[-1]))
    return rows


def best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each cell's row at its best learning rate."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["rank"], row["palettes"], row["method"])
        if key not in found or value_of(row) > value_of(found[key]):
            found[key] = row
    return list(found.values())


def value_of(row: dict[str, Any]) -> float:
    """Returns a row's GenEval."""
    return row["metrics"]["geneval"]["value"]


def line(row: dict[str, Any]) -> str:
    """Returns a row of the table."""
    cells = [f"{m['gain']:+.2f} [{m['low']:+.2f}, {m['high']:+.2f}]" for m in row["metrics"].values()]
    front = (
        row["corrections"],
        row["rank"],
        row["method"],
        f"{row['trained_numbers'] / 1e3:.0f}k",
        f"{row['rate']:g}",
    )
    return "| " + " | ".join([*map(str, front), *cells]) + " |"


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Returns the gain in GenEval over the base, against the rank and against the number of corrections."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, rows, "rank", "corrections")
    _panel(right, rows, "corrections", "rank")
    left.set_ylabel("gain in GenEval over the base")
    right.legend(fontsize="small")
    return figure


def _panel(axes: Axes, rows: Sequence[dict[str, Any]], varied: str, fixed: str) -> None:
    """Draws every method where `fixed` has the value at which `varied` has most."""
    values = sorted({row[varied] for row in rows})
    at = max({row[fixed] for row in rows}, key=lambda v: len({r[varied] for r in rows if r[fixed] == v}))
    for method in METHODS:
        shown = [row for row in rows if row["method"] == method and row[fixed] == at]
        shown.sort(key=lambda row: row[varied])
        found = [row["metrics"]["geneval"] for row in shown]
        below, above = [m["gain"] - m["low"] for m in found], [m["high"] - m["gain"] for m in found]
        axes.errorbar(
            [values.index(row[varied]) for row in shown], [m["gain"] for m in found], yerr=[below, above],
            label=method, linestyle="-" if method in ("I", "P", "S") else "--", marker="o", capsize=3,
        )  # fmt: skip
    axes.set_xticks(range(len(values)), list(map(str, values)))
    axes.set_xlabel(f"{varied} ({fixed} {at})")
    axes.axhline(0, color="0.8", linewidth=0.8)


def main(options: Options) -> None:
    """Trains, measures, and writes figures, table and plot."""
    rows = best(measure(options))
    setting = {"prompts": options.prompts, "steps": options.sampling_steps, "torch": torch.__version__}
    write_text(options.results, json.dumps({"setting": setting, "cells": rows}, indent=1) + "\n")
    save(plot(rows), options.results.with_suffix(".png"))
    print("\n| corrections | rank | method | trained numbers | lr | GenEval | validation reward |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(map(line, rows)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
