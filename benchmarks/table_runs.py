"""The trainings and samplings of benchmarks.tables: their settings, their commands and their passes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.table_rows import Row, chosen_rows, steps_of
from hyperalign.errors import HyperAlignError
from hyperalign.files import write_text
from hyperalign.image_sets import read_record
from hyperalign.tiny.prompts import COLORS, NOUNS, content_of, plural
from train.config import BaseName, TrainConfig
from train.data.prompts import load_prompt_list
from train.generation.options import Options as Sampling
from train.generation.passes import image_passes
from train.methods.passes import Passes
from train.step_reward_options import Options as StepReward
from train.tiny.dataset import validation_prompts
from train.tiny.evaluate import PROMPT_SEED

ROOT = Path(__file__).parents[1]
BUDGET = 24_000.0
"""Passes of a training: about 150 steps of tiny_static."""
PROMPT_COUNT = 96
"""Of the embedded model's own prompts."""


@dataclass(frozen=True, slots=True)
class Options:
    """Which rows, and how they are trained, sampled and scored."""

    out: Path
    """Folder of trainings, images, scores and the report."""
    base: BaseName = "tiny"
    rows: tuple[str, ...] = ()
    """Rows by their names; all where there are none."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each training."""
    budget: float = BUDGET
    """Samples that pass the backbone in each training, forwards or backwards; 0 takes each recipe's steps.
    24,000 are about 150 steps of tiny_static."""
    prompts: Path = Path()
    """Prompt list; the embedded model has its own validation prompts."""
    prompt_count: int = 0
    """The first so many prompts of it; 0 takes all, or 96 of the embedded model's own."""
    images_per_prompt: int = 2
    sampling_steps: int = 12
    batch: int = 16
    """Images that are sampled at once."""
    jobs: int = 1
    """Trainings and samplings at a time; on a CPU as many as it has cores, with a thread each."""
    launch: tuple[str, ...] = ()
    """What launches a training instead of python, such as accelerate launch with its options."""
    preparation: tuple[str, ...] = ()
    """Further options of step_reward.py, which makes SPO's preference model."""
    training: tuple[str, ...] = ()
    """Further options of train.py."""
    sampling: tuple[str, ...] = ()
    """Further options of generate.py."""
    evaluation: tuple[str, ...] = ()
    """Further options of evaluate.py, such as --weights and --diversity-encoder."""

    @property
    def prompt_file(self) -> Path:
        """The prompts that all rows are sampled with."""
        return self.out / "prompts.jsonl"

    @property
    def entities(self) -> Path:
        """The entities of the embedded model's own prompts, for DyMO."""
        return self.out / "entities.json"


@dataclass(frozen=True, slots=True)
class Run:
    """A row from one seed: its training, if it has one, and its images."""

    options: Options
    row: Row
    seed: int
    config: TrainConfig
    """Of its training; of the base model's recipe where nothing is trained."""
    steps: int
    """Of its training; 0 where there is none."""

    @property
    def name(self) -> str:
        """Its folder, and its name among the sets of images."""
        return f"{self.row.key}-steps{self.steps}-seed{self.seed}" if self.steps else self.row.key

    @property
    def hypernetwork(self) -> Path:
        """What its training ends with."""
        return self.options.out / "runs" / self.name / "hypernetwork.safetensors"

    @property
    def step_reward(self) -> Path | None:
        """SPO's step-aware preference model, which is trained first; None for other methods."""
        if not self.steps or self.config.objective.method != "spo":
            return None
        return self.options.out / "runs" / "step_reward.safetensors"

    @property
    def images(self) -> Path:
        """Folder of its images."""
        return self.options.out / "images" / self.name

    @property
    def is_trained(self) -> bool:
        """Whether its training has ended, if it has one."""
        return not self.steps or self.hypernetwork.is_file()

    @property
    def is_sampled(self) -> bool:
        """Whether all its images are there."""
        record = read_record(self.images) if self.images.is_dir() else None
        return record is not None and record.complete

    def preparation(self, model: Path) -> list[str]:
        """Returns the command that trains SPO's step-aware preference model."""
        small = ("--steps", "300", "--warmup", "20", "--lr", "3e-4") if self.options.base == "tiny" else ()
        return [
            sys.executable, str(ROOT / "train" / "step_reward.py"),
            "--recipe", str(self.row.recipe_path(self.options.base)), "--out", str(model), *small,
            *self.options.preparation,
        ]  # fmt: skip

    def preparation_passes(self, model: Path, cfg: bool) -> float:
        """Returns what that training takes: guided predictions of both images of its pairs."""
        options = tyro.cli(StepReward, args=self.preparation(model)[2:])
        return (1 + cfg) * 2 * options.batch * options.steps

    def training(self) -> list[str]:
        """Returns the command of its training."""
        o = self.options
        judge = [] if self.step_reward is None else ["--spo.step-reward", str(self.step_reward)]
        return [
            *(o.launch or (sys.executable,)), str(ROOT / "train" / "train.py"),
            "--recipe", str(self.row.recipe_path(o.base)), *self.row.changes,
            "--optim.steps", str(self.steps), "--validation.every", "0",
            "--run.seed", str(self.seed), "--run.out", str(self.hypernetwork.parent), *judge, *o.training,
        ]  # fmt: skip

    def sampling(self, prompts: Path, folder: Path, limit: int = 0) -> list[str]:
        """Returns the command of its images."""
        o = self.options
        trained = ["--hypernetwork", str(self.hypernetwork)] if self.steps else []
        recipe = self.row.recipe_path(o.base) if self.steps else base_row().recipe_path(o.base)
        return [
            sys.executable, str(ROOT / "train" / "generate.py"), "--recipe", str(recipe),
            "--prompts", str(prompts), "--out", str(folder), "--limit", str(limit), "--batch", str(o.batch),
            "--images-per-prompt", str(o.images_per_prompt), "--steps", str(o.sampling_steps),
            *trained, *self.row.sampling, *self.embedded_sampling(), *o.sampling,
        ]  # fmt: skip

    def embedded_sampling(self) -> list[str]:
        """Returns what a method has to be told of the embedded model.

        Its reward counts in units, where the cosines that the authors' settings are for count in hundredths.
        """
        if self.options.base != "tiny":
            return []
        path = self.options.entities
        own = {
            "das": ["--das.alpha", "0.03"],
            "dymo": ["--dymo.scale", "1", *(["--dymo.entities", str(path)] if path.is_file() else [])],
        }
        return own.get(self.row.key, [])

    def image_passes(self, cfg: bool) -> Passes:
        """Returns what an image of it takes."""
        asked = ["--prompts", "_", "--out", "_", *self.row.sampling, *self.options.sampling]
        return image_passes(tyro.cli(Sampling, args=asked), self.options.sampling_steps, cfg)


def base_row() -> Row:
    """Returns the row whose recipe says what base model is sampled."""
    return next(row for row in chosen_rows(("static",)) if row.key == "static")


def runs_of(options: Options) -> list[Run]:
    """Returns all runs. Raises HyperAlignError on an unknown row, a missing recipe or too small a budget."""
    counts = options.jobs, options.images_per_prompt
    if not options.seeds or options.sampling_steps < 4 or min(counts) < 1 or options.prompt_count < 0:
        raise HyperAlignError(
            f"Found --seeds {options.seeds}, --sampling-steps {options.sampling_steps}, --jobs and "
            f"--images-per-prompt {counts}, and --prompt-count {options.prompt_count}; expected a seed, "
            "4 or more sampling steps, 1 or more jobs and images, and no negative count of prompts."
        )
    common = base_row().config(options.base)
    found: list[Run] = []
    for row in chosen_rows(options.rows):
        if not row.recipe:
            found.append(Run(options, row, 0, common, 0))
            continue
        config = row.config(options.base, options.training)
        steps = steps_of(config, options.budget, has_cfg(config))
        found += [Run(options, row, seed, config, steps) for seed in options.seeds]
    return found


def has_cfg(config: TrainConfig) -> bool:
    """Returns whether a guided sample is two passes."""
    return config.model.base != "flux"


def write_prompts(options: Options) -> Path:
    """Writes the prompts that all rows are sampled with; returns the file. Raises HyperAlignError.

    What GenEval's list says about each prompt stays with it: it is scored by that.
    """
    if options.prompts != Path():
        rows = load_prompt_list(options.prompts)[: options.prompt_count or None]
    elif options.base == "tiny":
        own = [text for text, _ in validation_prompts(options.prompt_count or PROMPT_COUNT, PROMPT_SEED)]
        write_text(options.entities, json.dumps({text: entities(text) for text in own}, indent=1) + "\n")
        rows = [{"prompt": text, "tag": content_of(text).family} for text in own]
    else:
        raise HyperAlignError(f"{options.base} has no prompts of its own. Name a list with --prompts.")
    write_text(options.prompt_file, "".join(json.dumps(row) + "\n" for row in rows))
    return options.prompt_file


def entities(prompt: str) -> list[list[str]]:
    """Returns the things of one of the embedded model's prompts, each with its colour if it has one."""
    nouns = {*NOUNS, *map(plural, NOUNS)}
    found: list[list[str]] = []
    colors: list[str] = []
    for word in prompt.split():
        if word in COLORS:
            colors = [word]
        elif word in nouns:
            found.append([word, *colors])
            colors = []
    return found
