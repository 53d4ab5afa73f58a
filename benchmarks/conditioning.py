"""When does conditioning pay: a static LoRA against I, P and S, by rank and by number of corrections.

    python -m benchmarks.conditioning                                       # hours on two cores; resumes
    python -m benchmarks.conditioning --methods static S --ranks 4 --palettes 2 --seeds 0

Every cell is a training of the embedded model with the recipe tiny_s: equal steps, equal images. The number
of corrections is that of the palettes in its prompts times eight colours; with one palette there is nothing
that depends on the prompt. The controls, which depend on nothing, try each learning rate at the middle rank
and number of palettes and go on with their best one; the others have the recipe's. The finalists are trained
as long as the recipe says, from several seeds, and the first seed once more for --long-steps, by which a
static LoRA has stopped improving; all are validated on the way. The oracle is a static LoRA for each prompt,
trained on that prompt alone.

Trainings and images' scores are kept in --out; the same command goes on. Writes the figures of
results/conditioning_pays.json and its two plots, and prints the tables.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator

from benchmarks.conditioning_report import best, curve_of, plot, plot_curves, report_of, tables
from benchmarks.one_prompt import OraclePlan, oracle_scores
from hyperalign.checkpoint import HyperAlign, load
from hyperalign.families.unet import TINY
from hyperalign.files import write_text
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.tiny.prompts import PALETTES
from train.analysis.conditioning import Strata
from train.analysis.plots import save
from train.config import TrainConfig
from train.inputs import load_inputs
from train.models.tiny import Tiny
from train.recipe import load_recipe
from train.start import trained_numbers
from train.tiny.dataset import validation_prompts
from train.tiny.evaluate import PROMPT_SEED, judged, sample_all
from train.trainer import Trainer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Method = Literal["static", "static, as large as S", "decoder without conditioning", "I", "P", "S"]
CONTROLS: tuple[Method, ...] = ("static", "static, as large as S", "decoder without conditioning")
METHODS: tuple[Method, ...] = (*CONTROLS, "I", "P", "S")
WORDINGS: dict[int, tuple[str, ...]] = {
    1: ("an icon of {}",),
    2: ("{}", "an icon of {}"),
    4: ("{}", *PALETTES),
}
"""By number of palettes, the wordings of a cell's prompts."""
CORRECTIONS = 8
"""Colours of a palette."""
GUIDANCE = 4.0

Scores = dict[str, list[float]]
"""By figure, one number a validation prompt."""


@dataclass(frozen=True, slots=True)
class Options:
    """Which cells are measured, and how."""

    methods: tuple[Method, ...] = METHODS
    """At the middle rank and number of palettes."""
    palette_methods: tuple[Method, ...] = METHODS
    """Those among them that are trained with the other numbers of palettes."""
    rank_methods: tuple[Method, ...] = ("static", "S")
    """At the other ranks."""
    ranks: tuple[int, ...] = (1, 4, 8)
    palettes: tuple[Literal[1, 2, 4], ...] = (1, 2, 4)
    rates: tuple[float, ...] = (1e-3, 2e-3)
    """Learning rates of the static LoRA at the middle rank and number of palettes; the best one counts."""
    decoder_rates: tuple[float, ...] = (5e-4, 1e-3)
    """The same of the decoder without conditioning, which as S's needs a lower one."""
    large_rates: tuple[float, ...] = (2.5e-4, 2e-3)
    """The same of the static LoRA that is as large as S, which comes apart at high ones."""
    steps: int = 300
    """Training steps of a cell."""
    finalists: tuple[Method, ...] = ("static", "S")
    """Trained for the recipe's steps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the finalists."""
    long_steps: int = 800
    """Training steps of the finalists' first seed once more; 0 leaves that out."""
    prompts: int = 120
    """Validation prompts of each cell."""
    noises: int = 2
    """Images of each."""
    sampling_steps: int = 12
    oracle: OraclePlan = field(default_factory=OraclePlan)
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
    steps: int
    seed: int = 0
    validated: bool = False
    """Whether it is validated on the way: the finalists' curves."""

    @property
    def name(self) -> str:
        """Its folder."""
        words = self.method.replace(",", "").replace(" ", "_")
        place = f"rank{self.rank}-palettes{self.palettes}"
        return f"{words}-{place}-lr{self.rate:g}-steps{self.steps}-seed{self.seed}"


def middle(values: Sequence[int]) -> int:
    """Returns the value in the middle of a list."""
    return values[len(values) // 2]


def middle_cells(options: Options, rate: float) -> Iterator[Cell]:
    """Yields the controls at every learning rate, and the others at the recipe's."""
    rank, palettes = middle(options.ranks), middle(options.palettes)
    tried: dict[Method, tuple[float, ...]] = dict.fromkeys(CONTROLS, options.rates)
    tried["decoder without conditioning"] = options.decoder_rates
    tried["static, as large as S"] = options.large_rates
    for method in options.methods:
        for own in tried.get(method, (rate,)):
            yield Cell(method, rank, palettes, own, options.steps)


def outer_cells(options: Options, rates: Mapping[str, float]) -> Iterator[Cell]:
    """Yields the other numbers of palettes at the middle rank, then the other ranks, at the best rates."""
    rank, palettes = middle(options.ranks), middle(options.palettes)
    for count in options.palettes:
        if count != palettes:
            for method in options.palette_methods:
                if method in options.methods:
                    yield Cell(method, rank, count, rates[method], options.steps)
    for other in options.ranks:
        if other != rank:
            for method in options.rank_methods:
                yield Cell(method, other, palettes, rates[method], options.steps)


def final_cells(options: Options, rates: Mapping[str, float], steps: int) -> Iterator[Cell]:
    """Yields the finalists from every seed, then their longer trainings."""
    rank, palettes = middle(options.ranks), middle(options.palettes)
    trainings = [(seed, steps) for seed in options.seeds]
    if options.long_steps:
        trainings.append((options.seeds[0], options.long_steps))
    for seed, count in dict.fromkeys(trainings):
        for method in options.finalists:
            yield Cell(method, rank, palettes, rates[method], count, seed, validated=True)


def config_of(cell: Cell, recipe: TrainConfig, out: Path) -> TrainConfig:
    """Returns the recipe of a cell."""
    network = dataclasses.replace(recipe.network, rank=cell.rank)
    if cell.method == "static":
        network = dataclasses.replace(network, conditioning="none")
    elif cell.method == "decoder without conditioning":
        network = dataclasses.replace(network, conditioning="constant")
    elif cell.method == "static, as large as S":
        network = as_large(network, recipe)
    variant = cell.method if cell.method in ("I", "P", "S") else "S"
    every = recipe.validation.every if cell.validated else 0
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, variant=variant),
        network=network,
        optim=dataclasses.replace(recipe.optim, lr=cell.rate, steps=cell.steps),
        data=dataclasses.replace(recipe.data, wordings=WORDINGS[cell.palettes]),
        validation=dataclasses.replace(recipe.validation, every=every),
        run=dataclasses.replace(recipe.run, out=out / cell.name, seed=cell.seed),
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


@dataclass(frozen=True, slots=True)
class Measurement:
    """Scores the images of cells, and keeps the scores in files."""

    options: Options
    base: Tiny

    def of(self, name: str, hyperalign: Callable[[], HyperAlign | None], palettes: int) -> Scores:
        """Returns the mean scores of each validation prompt's images; scores that are kept are read."""
        o = self.options
        path = o.out / name / f"scores-{o.prompts}x{o.noises}-{o.sampling_steps}.json"
        if not path.exists():
            images = sample_all(
                self.base, hyperalign(), o.prompts, seeds=tuple(range(o.noises)), steps=o.sampling_steps,
                guidance_scale=GUIDANCE, wordings=WORDINGS[palettes],
            )  # fmt: skip
            found = judged(images.contents)[0](images)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({metric: values.tolist() for metric, values in found.items()}))
        return json.loads(path.read_text(encoding="utf-8"))

    def strata(self, palettes: int) -> Strata:
        """Returns GenEval's families among the validation prompts."""
        prompts = validation_prompts(self.options.prompts, PROMPT_SEED, WORDINGS[palettes])
        return judged([content for _, content in prompts])[1]

    def of_cells(self, cells: Iterator[Cell], recipe: TrainConfig) -> list[dict[str, Any]]:
        """Trains and measures cells; returns each with its scores and those of the base model."""
        rows: list[dict[str, Any]] = []
        for cell in cells:
            config = config_of(cell, recipe, self.options.out)
            row = asdict(cell) | {
                "corrections": CORRECTIONS * cell.palettes,
                "trained_numbers": trained_numbers(config, TINY),
                "scores": self.of(cell.name, lambda config=config: trained(config), cell.palettes),
                "base": self.of(f"base-palettes{cell.palettes}", lambda: None, cell.palettes),
                "strata": self.strata(cell.palettes),
                "curve": curve_of(config.run.out / "log.jsonl") if cell.validated else [],
            }
            rows.append(row)
        return rows


def main(options: Options) -> None:
    """Trains, measures, and writes figures, tables and plots."""
    recipe, measurement = load_recipe(options.recipe), Measurement(options, Tiny(load_tiny()))
    found = measurement.of_cells(middle_cells(options, recipe.optim.lr), recipe)
    rates = {row["method"]: row["rate"] for row in best(found)}
    found += measurement.of_cells(outer_cells(options, rates), recipe)
    finals = measurement.of_cells(final_cells(options, rates, recipe.optim.steps), recipe)
    oracle = oracle_scores(
        options.oracle, recipe, measurement.base, WORDINGS[middle(options.palettes)], noises=options.noises,
        sampling_steps=options.sampling_steps, guidance_scale=GUIDANCE, out=options.out / "oracle",
    )  # fmt: skip
    report: dict[str, Any] = {
        "setting": {
            "prompts": options.prompts, "noises": options.noises, "steps": options.sampling_steps,
            "torch": torch.__version__,
        },
        **report_of(found, finals, oracle),
    }  # fmt: skip
    write_text(options.results, json.dumps(report, indent=1) + "\n")
    save(plot(report["cells"]), options.results.with_suffix(".png"))
    save(plot_curves(report["finalists"]), options.results.with_name("conditioning_curves.png"))
    print(tables(report))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
