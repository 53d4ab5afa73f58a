"""Learning rates of the tables' methods on the embedded model: each row is trained at several.

    python -m benchmarks.table_rates --out runs/rates --jobs 2          # hours; the same command resumes
    python -m benchmarks.table_rates --out runs/rates --rows dpo spo --rates 1e-4 3e-4

Trainings have the tables' budget and one seed, and are sampled on prompts that the tables do not have. Writes
--out/rates.md and rates.json: what each rate gives, in bold the best by the validation reward, which no
method optimises. The recipes in `train/recipes/methods/` have the best rates.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.table_execution import make_all, prepare, run_command, score
from benchmarks.table_report import markdown_table, metrics_of
from benchmarks.table_results import environment_of, machine_text, read_scores
from benchmarks.table_rows import ROWS
from benchmarks.table_runs import PROMPT_COUNT, Options, Run, runs_of
from hyperalign.errors import HyperAlignError
from hyperalign.files import write_text
from hyperalign.tiny.prompts import content_of
from train.data.prompts import load_prompts
from train.evaluation.table import TASK_MEAN
from train.tiny.dataset import validation_prompts
from train.tiny.evaluate import PROMPT_SEED

JUDGE = "tiny validation reward"
METRICS = ("tiny reward", JUDGE, TASK_MEAN)


@dataclass(frozen=True, slots=True)
class Rates(Options):
    """Which rows are trained at which rates; the rest is as in benchmarks.tables."""

    rows: tuple[str, ...] = tuple(
        row.key for row in ROWS if row.recipe.startswith("methods/") and row.key != "sft"
    )
    """Rows of benchmarks.tables; fine-tuning has the rate of tiny_static, whose loss it is."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    seeds: tuple[int, ...] = (0,)
    prompt_count: int = 48
    """Prompts that follow those of the tables."""

    def at(self, rate: float) -> Rates:
        """Returns the options for trainings at a rate, which have a folder of their own."""
        return dataclasses.replace(
            self, out=self.out / f"{rate:g}", prompts=self.out / "prompts.txt",
            training=("--optim.lr", f"{rate:g}", *self.training),
        )  # fmt: skip


def main(options: Rates) -> None:
    """Trains, samples, scores and writes the report. Raises HyperAlignError."""
    prompts = write_prompts(options)
    runs = {rate: runs_of(options.at(rate)) for rate in options.rates}
    for own in runs.values():
        prepare(own[0].options, own)
    sets = {"base": runs[options.rates[0]][0]}
    sets |= {set_name(run, rate): run for rate, own in runs.items() for run in own if run.steps}
    make_all(options, list(sets.values()), prompts)
    score(options, {name: run.images for name, run in sets.items()})
    print(write_report(options, sets["base"]))


def write_prompts(options: Rates) -> Path:
    """Writes the prompts that follow the tables' own; returns the file. Raises HyperAlignError."""
    if options.base != "tiny" or options.prompts != Path() or not options.rates:
        raise HyperAlignError(
            f"Found --base {options.base}, --prompts {options.prompts} and --rates {options.rates}; expected "
            "tiny, no list of prompts, and one rate or more. The recipes of other base models have their "
            "authors' rates."
        )
    chosen = validation_prompts(PROMPT_COUNT + options.prompt_count, PROMPT_SEED)[PROMPT_COUNT:]
    path = options.out / "prompts.txt"
    write_text(path, "\n".join(text for text, _ in chosen) + "\n")
    return path


def set_name(run: Run, rate: float) -> str:
    """Returns the name of a training's images."""
    return f"{run.name} at {rate:g}"


def write_report(options: Rates, base: Run) -> str:
    """Writes rates.md and rates.json of what is scored; returns the former."""
    folder = options.out
    scores = read_scores(folder / "evaluation" / "prompts.csv")
    prompts = load_prompts(folder / "prompts.txt")
    metrics = metrics_of(scores, [content_of(prompt).family for prompt in prompts])
    values = {
        name: {metric.name: metric.value(name) for metric in metrics if metric.name in METRICS}
        for name in scores[JUDGE]
    }
    best: dict[str, str] = {}
    for name, found in values.items():
        row = name.split("-steps")[0]
        if row != "base" and (row not in best or found[JUDGE] > values[best[row]][JUDGE]):
            best[row] = name
    table = [["training", *METRICS]]
    for name, found in values.items():
        shown = f"**{name}**" if name in best.values() else name
        table.append([shown, *(f"{found[metric]:.3f}" for metric in METRICS)])
    text = (
        f"Trainings of {options.budget:,.0f} passes from seed {', '.join(map(str, options.seeds))}; "
        f"{len(prompts)} prompts that the tables do not have x {options.images_per_prompt} images, "
        f"{options.sampling_steps} steps. Bold is the best of a row's rates by the validation reward. "
        f"{machine_text(environment_of(base.images))}.\n\n"
        + markdown_table([table[0], *sorted(table[1:], key=lambda cells: cells[0].strip("*"))])
        + "\n"
    )
    write_text(folder / "rates.md", text)
    write_text(folder / "rates.json", json.dumps(values, indent=1) + "\n")
    return text


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Rates, description=__doc__)))
