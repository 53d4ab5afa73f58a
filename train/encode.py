"""Encodes preference images once, so that training reads latents instead of images.

On one GPU, where R is the recipe of the run:

python train/encode.py --recipe R --source data/pickapic_v2 --min-side 1024 --out data/preference-sdxl-1024

On several GPUs:

accelerate launch train/encode.py --recipe R --source data/HPDv2 --min-side 512 --out data/hpd-sd15

Stop it at any time; the same command resumes where it stopped, on any number of GPUs.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    # `python train/encode.py` puts train/ on sys.path, where train.py hides the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import tyro
from accelerate import Accelerator
from tqdm import tqdm

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from train.config import TrainConfig
from train.data.bad_images import BAD_FILE
from train.data.buckets import buckets_of
from train.data.encoding import Counts, encode_dataset
from train.data.preference import DatasetKind, FirstImages, UnsafeFilter, open_dataset
from train.models.image_encoder import image_encoder
from train.recipe import load_recipe


@dataclass(frozen=True, slots=True)
class Options:
    """The dataset, the recipe with the autoencoder, and the output folder."""

    recipe: Path
    """Recipe of the training run; its autoencoder and resolution are used."""
    source: Path
    """File or folder with the preference dataset."""
    out: Path
    """Folder for the latent shards."""
    kind: DatasetKind = "auto"
    """Layout of the source: pickapic (parquet files), pickapic_tars, parquet (columns chosen or image, and
    a caption), hpd (train.json of HPDv2 or HPDv3, and the images), imagefolder (metadata.jsonl), folder (a
    .txt, .caption or .json beside each image) or jsonl ({"image": ..., "caption": ...}); auto detects it. Of
    a list of captions, the image's name decides which one it gets."""
    unsafe_column: str | None = None
    """Column in which the dataset marks unsafe images, which are skipped; default: data.unsafe_column of the
    recipe, "" for none."""
    unsafe_above: float | None = None
    """Numbers in that column above this are unsafe; default: data.unsafe_above of the recipe."""
    min_side: int = 0
    """Leave out images smaller than a square of this side in pixels, or than their bucket in proportion:
    enlarged images teach blur, and none is enlarged where this is the recipe's resolution."""
    buckets: bool = True
    """Encode each image to the size of the nearest aspect ratio from 1:2 to 2:1, all of about equal area. A
    square crop would cut away what captions name; --no-buckets crops all to squares."""
    pairs: bool = False
    """Encode each preferred image with the one that it won against, for dpo and kto. Ties are left out."""
    limit: int | None = None
    """Take only the first images of the source, for a trial; those that are skipped count too."""
    batch: int = 16
    """Images per call of the autoencoder."""
    workers: int = 8
    """Threads per process that decode and resize images."""


def unsafe_filter(options: Options, config: TrainConfig) -> UnsafeFilter | None:
    """Returns the filter of the command line; its defaults come from the recipe."""
    column = config.data.unsafe_column if options.unsafe_column is None else options.unsafe_column
    above = config.data.unsafe_above if options.unsafe_above is None else options.unsafe_above
    return UnsafeFilter(column, above) if column else None


def run(options: Options, accelerator: Accelerator) -> Counts:
    """Encodes the units of this process, with a progress bar in the main one. Raises HyperAlignError."""
    config = load_recipe(options.recipe)
    unsafe = unsafe_filter(options, config)
    with accelerator.main_process_first():  # it writes the index of a tar, which the others read
        dataset = open_dataset(options.kind, options.source, unsafe, options.pairs)
    if options.limit is not None:
        dataset = FirstImages(dataset, options.limit)
    encoder = image_encoder(config, accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    bar: tqdm[Any] = tqdm(
        total=len(range(rank, dataset.units(), world)), unit="unit", disable=not accelerator.is_main_process
    )

    def show(counts: Counts) -> None:
        seconds = max(1e-9, float(bar.format_dict["elapsed"]))
        metrics = {"images": counts.images, "bad": counts.bad, "too small": counts.too_small}
        bar.set_postfix(metrics, rate=f"{counts.images / seconds:.1f}/s")
        bar.update(counts.units - bar.n)

    with bar:
        return encode_dataset(
            dataset,
            encoder,
            options.out,
            rank=rank,
            world=world,
            batch=options.batch,
            workers=options.workers,
            min_side=options.min_side,
            buckets=buckets_of(encoder.resolution) if options.buckets else None,
            unsafe=unsafe,
            pairs=options.pairs,
            progress=show,
        )


def skipped(counts: Counts) -> str:
    """Returns a sentence with the numbers of skipped images, empty if there are none."""
    reasons = {"bad": counts.bad, "too small": counts.too_small, "marked unsafe": counts.unsafe}
    parts = [f"{count} {reason}" for reason, count in reasons.items() if count]
    return f"Skipped: {', '.join(parts)}." if parts else ""


def summary(counts: Counts, options: Options) -> str:
    """Returns what this process encoded, skipped and enlarged in this run."""
    source = "" if options.limit is None else f" of the first {options.limit} of {options.source}"
    said = [f"Encoded {counts.images} images{source} in this process to {options.out}.", skipped(counts)]
    if counts.enlarged:
        said.append(
            f"Enlarged: {counts.enlarged}, which teaches blur; --min-side at the recipe's resolution leaves "
            "them out."
        )
    return " ".join(filter(None, said))


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
        print("\nStopped; run the same command again to resume.", file=sys.stderr)
        return 130
    if counts.unreadable:
        print(
            f"error: {counts.unreadable} units cannot be read and were skipped; {options.out / BAD_FILE} "
            "lists them. Download them again and run the same command: it makes only what is missing.",
            file=sys.stderr,
        )
        return 1
    if accelerator.is_main_process:
        print(summary(counts, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
