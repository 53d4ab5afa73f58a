"""Encodes preference images once, so that training reads latents instead of images.

python train/encode.py --recipe train/recipes/sd15_s.toml --source data/pickapic_v2 --out data/pickapic-sd15
accelerate launch train/encode.py --recipe R --source data/HPDv2 --kind hpd --out data/hpd-sd15

Stop it at any time; the same command goes on where it stopped, also on another number of GPUs.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    # `python train/encode.py` puts train/ on the path, where train.py would hide the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import tyro
from accelerate import Accelerator
from tqdm import tqdm

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from train.config import TrainConfig
from train.data.encoding import BAD_FILE, Counts, encode
from train.data.preference import Kind, UnsafeMark, open_source
from train.models.image_encoder import image_encoder
from train.recipe import load_recipe


@dataclass(frozen=True, slots=True)
class Options:
    """What to encode, with which recipe's autoencoder, and where to put it."""

    recipe: Path
    """Recipe whose base model and resolution the latents are for."""
    source: Path
    """File or folder with the preference images."""
    out: Path
    """Folder for the latent shards."""
    kind: Kind = "auto"
    """pickapic (parquet), pickapic_tars, hpd (train.json and train.tar), folder, jsonl; auto looks."""
    unsafe_column: str | None = None
    """Name of the data set's own mark of unsafe images, left out then; default: the recipe's."""
    unsafe_above: float | None = None
    """Numbers in that column above this are unsafe; default: the recipe's."""
    min_side: int = 0
    """Leave out images whose short side has fewer pixels: enlarged ones teach blur."""
    batch: int = 16
    """Images in a call of the autoencoder."""
    workers: int = 8
    """Threads of each process that decode and resize."""


def unsafe_mark(options: Options, config: TrainConfig) -> UnsafeMark | None:
    """Returns which images are to be left out as unsafe: by the command line, or else by the recipe."""
    column = config.data.unsafe_column if options.unsafe_column is None else options.unsafe_column
    above = config.data.unsafe_above if options.unsafe_above is None else options.unsafe_above
    return UnsafeMark(column, above) if column else None


def run(options: Options, accelerator: Accelerator) -> Counts:
    """Encodes this process's units with a progress bar on the main one. Raises HyperAlignError."""
    config = load_recipe(options.recipe)
    unsafe = unsafe_mark(options, config)
    with accelerator.main_process_first():  # it indexes a tar, the others read the index
        source = open_source(options.kind, options.source, unsafe)
    encoder = image_encoder(config, accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    bar: tqdm[Any] = tqdm(
        total=len(range(rank, source.units(), world)), unit="unit", disable=not accelerator.is_main_process
    )

    def show(counts: Counts) -> None:
        seconds = max(1e-9, float(bar.format_dict["elapsed"]))
        metrics = {"images": counts.images, "bad": counts.bad, "unsafe": counts.unsafe}
        bar.set_postfix(metrics, rate=f"{counts.images / seconds:.1f}/s")
        bar.update(counts.units - bar.n)

    with bar:
        return encode(
            source,
            encoder,
            options.out,
            rank=rank,
            world=world,
            batch=options.batch,
            workers=options.workers,
            min_side=options.min_side,
            unsafe=unsafe,
            progress=show,
        )


def left_out(counts: Counts) -> str:
    """Returns what was left out, in words."""
    reasons = {"bad": counts.bad, "too small": counts.small, "marked unsafe": counts.unsafe}
    parts = [f"{count} {reason}" for reason, count in reasons.items() if count]
    return f"Left out: {', '.join(parts)}." if parts else ""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    logging.basicConfig(format="%(message)s")
    accelerator = Accelerator()
    try:
        counts = run(options, accelerator)
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(
            f"error: the GPU's memory is full ({first_line(error)}) Lower --batch, now {options.batch}, and "
            "run the same command again: finished shards stay and are not made again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nStopped; run the same command again to go on.", file=sys.stderr)
        return 130
    if counts.broken:
        print(
            f"error: {counts.broken} units cannot be read and were left out; {options.out / BAD_FILE} names "
            "them. Fetch them again and run the same command: it makes only what is missing.",
            file=sys.stderr,
        )
        return 1
    if accelerator.is_main_process:
        done = f"Encoded {counts.images} images in this process to {options.out}."
        print(f"{done} {left_out(counts)}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
