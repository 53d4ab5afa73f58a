"""Scores folders of images and writes one table, as the paper's Tables 1 and 2.

python train/evaluate.py --sets base=images/base s=images/s --out report --weights models/hyperalign_rewards
accelerate launch train/evaluate.py --sets base=images/base s=images/s --out report

The folders are those of train/generate.py, or others in GenEval's layout, with the same prompts and seeds.
Stop it at any time; the same command resumes, on any number of GPUs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

if not __package__:
    # `python train/evaluate.py` puts train/ on sys.path, where train.py hides the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from hyperalign.openmp import wait_passively

    wait_passively()  # before torch is imported

import numpy as np
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs

from hyperalign.errors import HyperAlignError
from hyperalign.files import check_writable
from hyperalign.image_sets import ImageSet
from hyperalign.rewards import tiny
from hyperalign.tiny.prompts import content_of
from train.evaluation.image_sets import Metadata, digests_of, open_sets, shared_metadata
from train.evaluation.report import Grid, Report, markdown, write_report
from train.evaluation.scorers import (
    CORRECT,
    DIVERSITY,
    Scorer,
    Weights,
    diversity_scorer,
    geneval_scorer,
    reward_scorer,
    tiny_diversity_scorer,
    tiny_geneval_scorer,
)
from train.evaluation.scoring import Unit, Work, values_of
from train.evaluation.table import Numbers, columns, metrics

PAPER = ("aesthetic", "pickscore", "imagereward", "clip", "hpsv2.1")
"""The rewards of the paper's Tables 1 and 2."""
CACHE = "values"


@dataclass(frozen=True, slots=True)
class Options:
    """The images, the scorers and the report."""

    sets: tuple[str, ...]
    """NAME=FOLDER of each set of images; all are compared with the one named base, or else the first."""
    out: Path
    """Folder for the report; the values of finished batches are kept in it, too."""
    rewards: tuple[str, ...] = ()
    """Rewards, in the table's order; default: the paper's five, or for images of the tiny model its two."""
    weights: Path = Path("models/hyperalign_rewards")
    """Folder of the weights of the rewards and of GenEval's detector."""
    tokenizer: Path | None = None
    """Folder of the tokenizer's vocabulary (default: that of the weights)."""
    download: bool = False
    """Download missing weights into the folder first."""
    geneval: Literal["auto", "official", "tiny", "none"] = "auto"
    """GenEval's families: by the official rules, which need the official metadata of the prompts, or by those
    of the tiny model. auto does what the prompts allow."""
    diversity_encoder: Path | None = None
    """Folder of an image encoder that no method optimised, such as DINOv2, in transformers' layout; diversity
    is the mean cosine distance of a prompt's images in it. The tiny model has its own."""
    batch: int = 16
    """Images per call of a network."""
    workers: int = 8
    """Threads per process that read and decode images."""
    grid_prompts: int = 24
    """Prompts on the page, spread over the list."""
    grid_seeds: int = 1
    """Images of each of them and each set."""
    grid_side: int = 256
    """Pixels of their longer side."""
    cpu: bool = False
    """Compute on the CPU."""


def check_numbers(options: Options) -> None:
    """Raises HyperAlignError on a number below 1."""
    for name in ("batch", "workers", "grid_prompts", "grid_seeds", "grid_side"):
        if (value := getattr(options, name)) < 1:
            raise HyperAlignError(f"--{name.replace('_', '-')} is {value}; expected 1 or more.")


def is_of_tiny(sets: Mapping[str, ImageSet]) -> bool:
    """Returns whether the tiny model generated all images, as far as is known."""
    return all(one.run is not None and one.run.settings.base == "tiny" for one in sets.values())


def scorers_of(
    options: Options, sets: Mapping[str, ImageSet], metadata: list[Metadata]
) -> tuple[list[Scorer], list[str]]:
    """Returns the scorers, whose weights are all there, and what the table lacks and why.

    Raises HyperAlignError on an unknown reward, one that is given twice, missing weights, or prompts that a
    scorer cannot read.
    """
    names = options.rewards or (tiny.NAMES if is_of_tiny(sets) else PAPER)
    if len(set(names)) < len(names):
        raise HyperAlignError(f"--rewards has {', '.join(names)}; give each of them once.")
    weights = Weights(options.weights, options.tokenizer, options.download)
    prompts = [line["prompt"] for line in metadata]
    found = [reward_scorer(name, weights, prompts) for name in names]
    notes: list[str] = []
    is_tiny = all(name in tiny.NAMES for name in names)
    match geneval_of(options, metadata, is_tiny):
        case "official":
            found.append(geneval_scorer(weights, metadata))
        case "tiny":
            found.append(tiny_geneval_scorer(prompts))
        case _:
            notes.append("No figures of GenEval: the prompts are not its, or it was left out.")
    if len(next(iter(sets.values())).images[0]) < 2:
        notes.append("No diversity: there is one image of each prompt, and it compares two or more.")
    elif options.diversity_encoder is not None:
        found.append(diversity_scorer(options.diversity_encoder))
    elif is_tiny:
        found.append(tiny_diversity_scorer())
    else:
        notes.append("No diversity: --diversity-encoder names no image encoder.")
    return found, notes


def geneval_of(
    options: Options, metadata: list[Metadata], is_tiny: bool
) -> Literal["official", "tiny", "none"]:
    """Returns whose rules say whether an image is correct."""
    if options.geneval != "auto":
        return options.geneval
    if not is_tiny:
        return "official" if all("include" in line for line in metadata) else "none"
    try:
        for line in metadata:
            content_of(line["prompt"])
    except HyperAlignError:
        return "none"
    return "tiny"


def tags_of(options: Options, metadata: list[Metadata], is_tiny: bool) -> list[str]:
    """Returns the task of each prompt; none without GenEval."""
    match geneval_of(options, metadata, is_tiny):
        case "official":
            return [line["tag"] for line in metadata]
        case "tiny":
            return [content_of(line["prompt"]).family for line in metadata]
        case _:
            return []


def evaluate(options: Options, accelerator: Accelerator) -> Report:
    """Scores all images and returns the report; every process has the same. Raises HyperAlignError."""
    check_numbers(options)
    sets = open_sets(options.sets)
    metadata = shared_metadata(sets)
    check_writable(options.out / "report.html", "Choose another --out.")
    with accelerator.main_process_first():  # it downloads
        scorers, notes = scorers_of(options, sets, metadata)
    paths = [path for one in sets.values() for row in one.images for path in row]
    digests = digests_of(paths, accelerator, options.workers)
    work = Work(accelerator, options.out / CACHE, options.batch, options.workers)
    values = {scorer.name: _values(scorer, sets, metadata, digests, work) for scorer in scorers}
    diversity = values.pop(DIVERSITY, {})
    rewards = {name: found for name, found in values.items() if name != CORRECT}
    tags = tags_of(options, metadata, all(name in tiny.NAMES for name in rewards))
    found = metrics(rewards, values.get(CORRECT, {}), tags, diversity)
    seconds = {name: _seconds(one) for name, one in sets.items()}
    settings = {
        "scorers": {scorer.name: scorer.identity for scorer in scorers},
        "dtype": "float32",
        "prompts": len(metadata),
        "images of each prompt": len(next(iter(sets.values())).images[0]),
        "runs": {name: None if one.run is None else asdict(one.run) for name, one in sets.items()},
    }
    return Report(sets, metadata, values, found, columns(found, seconds), notes, settings)


def _values(
    scorer: Scorer,
    sets: Mapping[str, ImageSet],
    metadata: list[Metadata],
    digests: Mapping[Path, str],
    work: Work,
) -> dict[str, Numbers]:
    """Returns a scorer's values by set: of every image (P, S), or of every prompt (P,)."""
    units: list[Unit] = []
    for one in sets.values():
        for line, row in zip(metadata, one.images, strict=True):
            groups = [tuple(row)] if scorer.of_prompts else [(path,) for path in row]
            units += [Unit(images, line) for images in groups]
    values = np.array(values_of(scorer, units, digests, work)).reshape(len(sets), len(metadata), -1)
    return {name: rows[:, 0] if scorer.of_prompts else rows for name, rows in zip(sets, values, strict=True)}


def _seconds(images: ImageSet) -> float | None:
    measured = None if images.run is None else images.run.seconds_per_image
    return None if measured is None else measured.median


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    logging.basicConfig(format="%(message)s")
    # The main process downloads while the others wait, and one may have fewer batches than another.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(cpu=options.cpu, kwargs_handlers=[patience])
    is_main = accelerator.is_main_process
    try:
        report = evaluate(options, accelerator)
        if is_main:
            grid = Grid(options.grid_prompts, options.grid_seeds, options.grid_side)
            paths = write_report(report, options.out, grid, options.workers)
            print(f"{markdown(report)}\nWrote {', '.join(path.name for path in paths)} to {options.out}.")
    except HyperAlignError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main:
            print("\nStopped; run the same command again to resume.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
