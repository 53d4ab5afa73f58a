"""Draws the images of a prompt list with a base model and one method, for tables such as the paper's.

python train/generate.py --recipe train/recipes/tiny_s.toml --prompts prompts.txt --out images/base
python train/generate.py --recipe R --prompts P --out images/s --hypernetwork mine.safetensors
python train/generate.py --recipe R --prompts P --out images/lora --lora lora.safetensors --strength 0.8
python train/generate.py --recipe R --prompts P --out images/dpo --fine-tuned models/dpo-sd15/unet
python train/generate.py --recipe R --prompts P --out images/best --test-time best-of-N --search.candidates 8
python train/generate.py --recipe R --prompts P --out images/guided --test-time guidance
python train/generate.py --recipe R --prompts P --out images/greedy --test-time epsilon-greedy-steps
python train/generate.py --recipe R --prompts P --out images/dymo --test-time dymo --dymo.entities words.json
accelerate launch train/generate.py ...

The images come in GenEval's layout, OUT/00000/samples/0000.png with OUT/00000/metadata.jsonl; OUT/run.json
says what made them and how long one took. An image's noise depends on its prompt's place in the list and its
seed alone, so that any number of processes and any batch draws the same images. The same command resumes.
"""

from __future__ import annotations

import logging
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

if not __package__:
    # `python train/generate.py` puts train/ on the path, where train.py would hide the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from hyperalign.openmp import wait_passively

    wait_passively()  # before torch is imported

import torch
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm import tqdm

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from train.generation.options import Options
from train.generation.run import generate, planned
from train.stopping import Stopped, StopRequest


def run(options: Options) -> str:
    """Draws all images; returns a sentence about them. Raises HyperAlignError and Stopped."""
    plan = planned(options)
    # Processes finish their shares at different times.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(kwargs_handlers=[patience])
    if plan.config.run.threads:
        torch.set_num_threads(plan.config.run.threads)
    bar: tqdm[Any] = tqdm(unit="image", disable=not accelerator.is_main_process, smoothing=0.05)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    stop = StopRequest()
    with bar, stop.listening(), stop.immediate():
        record = generate(plan, accelerator, show)
    seconds, count = record.seconds_per_image, len(plan.jobs)
    timing = "" if seconds is None else f", {seconds.median:.3g} s each (median)"
    return f"{options.out}: {count} images of {record.name}{timing}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    batch = 0
    try:
        options = tyro.cli(Options, args=arguments, description=__doc__)
        batch = options.batch
        message = run(options)
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Stopped):
        print("Stopped; the same command goes on with the images that are missing.", file=sys.stderr)
        return 130
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: the GPU's memory is full ({first_line(error)}) {_less_memory(batch)}", file=sys.stderr)
        return 1
    print(message)
    return 0


def _less_memory(batch: int) -> str:
    """Returns what to change where the GPU's memory does not do."""
    if batch > 1:
        return (
            f"Lower --batch from {batch} to {batch // 2}; the command then goes on with the missing images."
        )
    return (
        "--batch is 1 already: take --precision bfloat16, or lower --guidance.decode-size for guidance, "
        "--text-length for FLUX.1 and SD 3.5, or --resolution for images of another size."
    )


if __name__ == "__main__":
    sys.exit(main())
