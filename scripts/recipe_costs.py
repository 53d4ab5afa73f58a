"""Writes what a recipe of a real base model costs into its header and the README.

python scripts/recipe_costs.py                                       # all of train/recipes
python scripts/recipe_costs.py train/recipes/sd15_s.toml             # one of them

Operations and bytes are those of train/preflight. Seconds are the operations of rollout, reward and
preference loss at the rates of measured steps on an H200, whose arithmetic is an H100's, with the passes that
fit 80 GiB: 1.81 s a step of SD 1.5, 5.80 of SDXL and, with two prompts, 8.68 of FLUX.1 (benchmarks/README.md;
torch 2.11, random weights of true shape).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

from hyperalign.files import write_text
from scripts.common import ROOT, say
from train.config import TrainConfig
from train.methods.passes import step_passes
from train.models.text_encoders import text_bytes
from train.preflight.estimate import (
    Work,
    checkpoint_bytes,
    export_bytes,
    gain_work,
    step_memory,
    step_work,
    validation_work,
)
from train.preflight.fit import USUAL_CARD, fitted
from train.preflight.input_checks import GIB
from train.preflight.step_costs import costs_of_shape
from train.recipe import load_recipe

FOLDER = ROOT / "train" / "recipes"
METHODS = FOLDER / "methods"
README = ROOT / "README.md"
SDXL = Work(rollout=314e12, reward=141e12, preference=63e12)
RATES = {
    "sd15": Work(rollout=216e12, reward=173e12, preference=71e12),
    "sdxl": SDXL,
    "flux": Work(rollout=371e12, reward=232e12, preference=276e12),
    "sd3": SDXL,
}
"""Operations a second of each part of a step on one card: those that `step_work` counts for the measured
steps over their seconds. SD 3.5 medium has not been measured; it has the rates of SDXL, which is as large."""
GPUS = 4
"""Of train/recipes/accelerate/4_gpus.yaml, which the headers name."""
PROMPTS = 20_000
"""Length of the training list of train/prompt_sets.py. Captions of preference images come on top."""
KEY, BEFORE, TIME = "#   cost:     ", "#   resume:   ", "#   time:     "
BEGIN, END = "<!-- recipes: python scripts/recipe_costs.py -->\n", "<!-- end of recipes -->\n"


@dataclass(frozen=True, slots=True)
class RecipeCost:
    """What a run costs on H100s."""

    seconds: float
    """Of a step, without validations; the same on one GPU and on many, as the batch is that of each GPU."""
    gpu_hours: float
    """Of all GPUs, with the validations."""
    peak: int
    """Bytes of GPU memory."""
    images: int
    """In a backward pass."""
    recomputed: str
    """What backward passes recompute."""
    checkpoints: int
    """Bytes on disk."""
    hypernetworks: int
    """Bytes on disk."""
    embeddings: int
    """Bytes on disk."""
    measured: bool
    """Whether the base model's rates were measured."""

    def line(self) -> str:
        """Returns the cost in one line."""
        disk = self.checkpoints + self.hypernetworks + self.embeddings
        rate = "" if self.measured else "; at the rates of SDXL, its own were not measured"
        return (
            f"{self.seconds:.2g} s a step; {_short(self.gpu_hours)} GPU hours on {GPUS} H100; "
            f"peak {self.peak / GIB:.0f} GiB; disk {_short(disk / GIB)} GiB (passes of {self.images}, "
            f"recomputed: {self.recomputed}; checkpoints {self.checkpoints / GIB:.1f}, "
            f"hypernetworks {self.hypernetworks / GIB:.1f}, text embeddings of "
            f"{PROMPTS:,} prompts {self.embeddings / GIB:.1f}{rate})"
        )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"


def cost_of_recipe(config: TrainConfig) -> RecipeCost:
    """Returns the cost of a recipe's run on cards of 80 GiB."""
    config, costs = fitted(config, USUAL_CARD, costs_of_shape)
    rates, every = asdict(RATES[config.model.base]), config.validation.every
    seconds = sum(work / rates[part] for part, work in asdict(step_work(config, costs)).items())
    validations = 1 + config.optim.steps // every if every else 0  # one before the first step
    sampled = validations * validation_work(config, costs, GPUS) + gain_work(config, costs, GPUS)
    validating = sampled / rates["rollout"]
    return RecipeCost(
        seconds=seconds,
        gpu_hours=GPUS * (config.optim.steps * seconds + validating) / 3600,
        peak=step_memory(config, costs).peak,
        images=config.objective.images_at_once or step_passes(config).largest_batch,
        recomputed=config.model.gradient_checkpointing,
        checkpoints=checkpoint_bytes(config, costs),
        hypernetworks=export_bytes(config, costs),
        embeddings=PROMPTS * sum(text_bytes(config)),
        measured=config.model.base != "sd3",
    )


def real_recipes() -> list[Path]:
    """Returns the recipes of real base models."""
    return sorted(path for path in FOLDER.rglob("*.toml") if not path.stem.startswith("tiny"))


def with_cost(text: str, line: str) -> str:
    """Returns a recipe's text with a line of cost in its header, in the place of an older one."""
    lines = [row for row in text.splitlines(keepends=True) if not row.startswith(KEY)]
    place = next(number for number, row in enumerate(lines, 1) if row.startswith(BEFORE))
    return "".join([*lines[:place], f"{KEY}{line}\n", *lines[place:]])


def cost_line(text: str) -> str:
    """Returns the cost in a recipe's header, of the tiny model its time; empty if there is none."""
    rows = (row.removeprefix(key) for row in text.splitlines() for key in (KEY, TIME) if row.startswith(key))
    return next(rows, "")


def table() -> str:
    """Returns the table of the recipes of HyperAlign, from their headers."""
    rows = ["| recipe | what it is | cost |", "|---|---|---|"]
    for path in sorted(set(FOLDER.rglob("*.toml")) - set(METHODS.glob("*.toml"))):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(FOLDER).with_suffix("").as_posix()
        title = text.splitlines()[0].removeprefix("# ").removesuffix(".")
        rows.append(f"| `{name}` | {title} | {cost_line(text).split(' (')[0]} |")
    return "\n".join(rows) + "\n"


def with_table(readme: str) -> str:
    """Returns the README with the table between its two marks."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def main(arguments: list[str] | None = None) -> int:
    """Writes the lines and the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", type=Path, help="all of train/recipes if none is named")
    for path in parser.parse_args(arguments).recipes or real_recipes():
        line = cost_of_recipe(load_recipe(path)).line()
        write_text(path, with_cost(path.read_text(encoding="utf-8"), line))
        say(f"{path}: {line}")
    write_text(README, with_table(README.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
