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

from hyperalign.files import write_text
from scripts.common import ROOT, say
from scripts.recipe_costs import FOLDER, GPUS, RATES, cost_line
from train.config import BaseName, TrainConfig
from train.generation.freedom import visits
from train.generation.options import SIDE, DasOptions, FreedomOptions
from train.methods.passes import step_passes
from train.preflight.estimate import Work, samples_per_image
from train.preflight.step_costs import StepCosts, costs_of_shape, without_recomputation
from train.recipe import load_recipe

PAGE = ROOT / "docs" / "methods.md"
BASES: tuple[BaseName, ...] = ("sd15", "flux")
STEPS = 50
"""Of the paper's images."""
IMAGES = 1000
"""Of the paper's Tables 1 and 2: one of each prompt of data/test_pickapic.txt."""
CANDIDATES = {"best-of-N": 20, "epsilon-greedy": 80}
"""Of one image: the paper's 20, and its 20 rounds of 4."""
TRAINED = (
    ("AlignProp", "methods/{}_alignprop"), ("DRaFT-1", "methods/{}_draft"),
    ("Diffusion-DPO", "methods/{}_dpo"), ("Diffusion-KTO", "methods/{}_kto"),
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

    def base(self) -> Work:
        """Returns that of an image of the base model."""
        return Work(rollout=STEPS * self.call + self.decoded, reward=0.0, preference=0.0)

    def search(self, candidates: int) -> Work:
        """Returns that of the best of some images."""
        return Work(candidates * (self.base().rollout + self.scored), 0.0, 0.0)

    def das(self, options: DasOptions) -> Work:
        """Returns that of an image by particles, all of whose steps have a gradient."""
        ends = options.particles * (self.decoded + self.scored)
        return Work(rollout=ends, reward=options.particles * STEPS * self.gradient, preference=0.0)

    def freedom(self, options: FreedomOptions) -> Work:
        """Returns that of an image some of whose steps are guided and repeated."""
        steps = [*visits(options, STEPS), (False, 1)]
        guided = sum(times for is_guided, times in steps if is_guided)
        plain = sum(times for is_guided, times in steps if not is_guided)
        return Work(plain * self.call + self.decoded, guided * self.gradient, 0.0)


def seconds(base: BaseName, work: Work) -> float:
    """Returns the seconds of some work on one H100."""
    rates = asdict(RATES[base])
    return sum(part / rates[name] for name, part in asdict(work).items())


def drawn_rows(base: BaseName) -> list[str]:
    """Returns the rows of the base model and of the test-time methods."""
    config = without_recomputation(load_recipe(FOLDER / f"{base}_static.toml"))
    work = ImageWork.of(config, costs_of_shape(config))
    rows = {"base model": ("draw base", work.base())}
    for mode, count in CANDIDATES.items():
        command = f"draw {mode} --test-time {mode} --search.candidates {count}"
        rows[f"{mode}, {count} candidates"] = (command, work.search(count))
    rows["DAS"] = ("draw das --test-time das", work.das(DasOptions()))
    rows["FreeDoM"] = ("draw freedom --test-time freedom", work.freedom(FreedomOptions()))
    return [
        f"| {name} | `{command}` | {short(each)} | {short(IMAGES * each / 3600)} |"
        for name, (command, found) in rows.items()
        for each in [seconds(base, found)]
    ]


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
