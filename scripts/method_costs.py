"""Writes into docs/methods.md what each row of the paper's Tables 1 and 2 costs on SD 1.5 and FLUX.1.

python scripts/method_costs.py

Trainings cost what the headers of their recipes say (scripts/recipe_costs.py writes those first). Test-time
methods cost the operations of an image, counted by train/preflight, at the rates of scripts/recipe_costs.py.
"""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

import tyro

from hyperalign.files import write_text
from scripts.common import ROOT, say
from scripts.recipe_costs import FOLDER, GPUS, RATES, cost_line
from train.config import BaseName, TrainConfig
from train.generation.options import SIDE, Options
from train.generation.passes import image_passes
from train.methods.passes import Passes, step_passes
from train.preflight.estimate import Work, samples_per_image
from train.preflight.step_costs import StepCosts, costs_of_shape, without_recomputation
from train.recipe import load_recipe

PAGE = ROOT / "docs" / "methods.md"
BASES: tuple[BaseName, ...] = ("sd15", "flux")
STEPS = 50
"""Of the paper's images."""
IMAGES = 1000
"""Of the paper's Tables 1 and 2: one of each prompt of data/test_pickapic.txt."""
DRAWN = (
    ("base model", "draw base"),
    ("best of 20", "draw best-of-N --test-time best-of-N --search.candidates 20"),
    ("epsilon-greedy, 20 x 4 a step", "draw epsilon-greedy --test-time epsilon-greedy-steps"),
    ("DAS", "draw das --test-time das --das.alpha 1e-4"),
    ("FreeDoM", "draw freedom --test-time freedom"),
    ("DyMO, at most", "draw dymo --test-time dymo"),
)
"""Rows that are not trained, with their commands."""
TRAINED = (
    ("AlignProp", "methods/{}_alignprop"), ("DRaFT-1", "methods/{}_draft"),
    ("Diffusion-DPO", "methods/{}_dpo"), ("Diffusion-KTO", "methods/{}_kto"), ("SPO", "methods/{}_spo"),
    ("DanceGRPO", "methods/{}_dance_grpo"), ("MixGRPO", "methods/{}_mix_grpo"), ("SRPO", "methods/{}_srpo"),
    ("supervised fine-tuning", "methods/{}_sft"), ("reward alone", "methods/{}_reward_only"),
    ("static LoRA, both losses", "{}_static"), ("HyperAlign-I", "{}_i"), ("HyperAlign-P", "{}_p"),
    ("HyperAlign-S", "{}_s"), ("HyperAlign-S, all layers adapted as in the paper", "{}_s_paper"),
)  # fmt: skip
"""Rows that are trained, with their recipes."""


@dataclass(frozen=True, slots=True)
class ImageWork:
    """Operations of the parts of an image."""

    call: float
    """A guided evaluation of the model."""
    gradient: float
    """The same with its gradient, with decoder and rewards."""
    decoded: float
    scored: float

    @classmethod
    def of(cls, config: TrainConfig, costs: StepCosts) -> ImageWork:
        """Returns those of a recipe. For a gradient, predictions are decoded at most at SIDE pixels."""
        model, decoding, scoring = costs.training, costs.decoding, costs.scoring
        pixels = min(1.0, SIDE / config.model.resolution) ** 2
        return cls(
            call=samples_per_image(costs) * costs.sampling.forward,
            gradient=samples_per_image(costs) * (model.forward + model.backward)
            + pixels * (decoding.forward + decoding.backward)
            + scoring.forward
            + scoring.backward,
            decoded=decoding.forward,
            scored=scoring.forward,
        )

    def image(self, options: Options) -> Work:
        """Returns that of an image by a method."""
        passes = image_passes(options, STEPS, cfg=False)  # in guided evaluations, whatever they take
        judged = images_scored(options, passes)
        shown = judged * (self.decoded + self.scored) if judged else self.decoded
        plain = passes.forwards - passes.backwards
        return Work(plain * self.call + shown, passes.backwards * self.gradient, 0.0)


def images_scored(options: Options, passes: Passes) -> float:
    """Returns how many images a method decodes and scores without a gradient for each one it keeps."""
    match options.test_time:
        case "best-of-N" | "epsilon-greedy" | "zero-order":
            return options.search.candidates
        case "epsilon-greedy-steps":
            return passes.forwards - STEPS + 1  # the candidates, and the image
        case "das":
            return options.das.particles
        case _:
            return 0


def seconds(base: BaseName, work: Work) -> float:
    """Returns the seconds of some work on one H100."""
    rates = asdict(RATES[base])
    return sum(part / rates[name] for name, part in asdict(work).items())


def drawn_rows(base: BaseName) -> list[str]:
    """Returns the rows of the base model and of the test-time methods."""
    config = without_recomputation(load_recipe(FOLDER / f"{base}_static.toml"))
    work = ImageWork.of(config, costs_of_shape(config))
    rows: list[str] = []
    for name, command in DRAWN:
        _, _, *asked = command.split()
        each = seconds(base, work.image(tyro.cli(Options, args=["--prompts", "_", "--out", "_", *asked])))
        rows.append(f"| {name} | `{command}` | {short(each)} | {short(IMAGES * each / 3600)} |")
    return rows


def trained_rows(base: BaseName) -> list[str]:
    """Returns the rows of the methods that are trained."""
    rows: list[str] = []
    for name, pattern in TRAINED:
        recipe = pattern.format(base)
        path = FOLDER / f"{recipe}.toml"
        hours, disk = cost_of_header(path)
        rows.append(f"| {name} | `train {recipe}` | {data(load_recipe(path))} | {disk} | {hours} |")
    return rows


def cost_of_header(path: Path) -> tuple[str, str]:
    """Returns GPU hours and GiB of disk from a recipe's header."""
    found = re.search(r"([\d.]+) GPU hours .* disk ([\d.]+) GiB", cost_line(path.read_text(encoding="utf-8")))
    if found is None:
        raise ValueError(f"{path} says no cost; run python scripts/recipe_costs.py {path}")
    return found[1], found[2]


def data(config: TrainConfig) -> str:
    """Returns what a run reads: prompts, and how many images or pairs are drawn, repetitions counted."""
    drawn = config.optim.steps * step_passes(config).preference_batch * GPUS
    if not drawn:
        return "prompts"
    return f"{drawn:,} {'pairs' if config.objective.needs_pairs else 'images'}"


def short(value: float) -> str:
    """Returns seconds or hours with two digits where they are few."""
    return f"{value:.0f}" if value >= 9.5 else f"{value:.2g}"


def tables(base: BaseName) -> str:
    """Returns the two tables of a base model."""
    return "\n".join([
        f"| row | command | seconds an image | GPU hours, {IMAGES:,} images |", "|---|---|---|---|",
        *drawn_rows(base), "",
        "| row | command | data | disk, GiB | GPU hours |", "|---|---|---|---|---|",
        *trained_rows(base), "",
    ])  # fmt: skip


def with_tables(page: str, base: BaseName) -> str:
    """Returns the page with a base model's tables between their two marks."""
    begin, end = f"<!-- {base}: python scripts/method_costs.py -->\n", f"<!-- end of {base} -->\n"
    before, rest = page.split(begin)
    return before + begin + tables(base) + end + rest.split(end)[1]


def main() -> int:
    """Writes the page; returns the exit status."""
    page = PAGE.read_text(encoding="utf-8")
    for base in BASES:
        page = with_tables(page, base)
    write_text(PAGE, page)
    say(f"Wrote {PAGE}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
