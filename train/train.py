"""Trains a hypernetwork from a recipe.

python train/train.py --recipe train/recipes/tiny_s.toml
python train/train.py --recipe train/recipes/tiny_s.toml --optim.lr 1e-4 --run.out runs/mine
accelerate launch train/train.py --recipe train/recipes/tiny_s.toml
python train/train.py --recipe train/recipes/tiny_s.toml --check
python train/train.py --recipe train/recipes/flux_s.toml --smoke
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

if not __package__:
    # `python train/train.py` puts train/ on the path, where this file would hide the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from hyperalign.openmp import wait_passively

    wait_passively()  # before torch is imported

import torch
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm import tqdm

from hyperalign.conditioning import warning
from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from train.config import TrainConfig
from train.inputs import download_rewards, load_inputs
from train.log import Metrics, flat
from train.models.load import download
from train.preflight.check import check
from train.preflight.fit import fitted_to
from train.preflight.input_checks import check_trackers
from train.preflight.smoke import remove_checkpoints, smoke_config, smoke_shape
from train.recipe import as_table, check_choices, load_recipe
from train.stopping import Stopped
from train.trainer import Trainer

LESS_MEMORY = (
    "Lower objective.micro_batch first, then set model.gradient_checkpointing to all, "
    "objective.conditional_only or model.vae to taesd: the same command then resumes from the last "
    "checkpoint. A smaller model.resolution is another run, with a run.out of its own."
)
LESS_BEFORE = (
    "The models and the search of key times do not fit: end other programs on the GPU, keep optim.bf16 on, "
    "set model.vae to taesd, the longest of data.text_lengths or objective.micro_batch lower, or write "
    "model.key_times into the recipe; then run the same command again."
)


@dataclass(frozen=True, slots=True)
class Switches:
    """What to do with the recipe."""

    check: bool
    smoke: bool
    download: bool


def parse(arguments: list[str]) -> tuple[TrainConfig, Switches]:
    """Returns the configuration and what to do with it. Raises HyperAlignError."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", type=Path)
    for name in ("check", "smoke", "download"):
        first.add_argument(f"--{name}", action="store_true")
    known, rest = first.parse_known_args(arguments)
    default = load_recipe(known.recipe) if known.recipe else TrainConfig()
    check_choices(rest)
    config = tyro.cli(TrainConfig, args=rest, default=default, description=__doc__)
    return config, Switches(known.check, known.smoke, known.download)


def prepare(config: TrainConfig, switches: Switches) -> Trainer:
    """Returns the trainer, with everything loaded. Raises HyperAlignError."""
    check_trackers(config)
    if switches.smoke:
        config = smoke_config(config)
    # The main process downloads, encodes prompts and samples images while the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(
        log_with=list(config.run.trackers) or None, project_dir=config.run.out, kwargs_handlers=[patience]
    )
    if switches.smoke:
        remove_checkpoints(config, accelerator)
    if switches.download and config.model.base != "tiny":
        with accelerator.main_process_first():
            download(config)
            download_rewards(config)
    config = fitted_to(config, accelerator)
    smoke = smoke_shape(config, accelerator.device) if switches.smoke else None
    trainer = Trainer(config, load_inputs(config, accelerator, smoke), accelerator)
    if config.run.trackers:
        accelerator.init_trackers(config.run.out.name, flat(as_table(config)))
    return trainer


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config, switches = parse(sys.argv[1:] if arguments is None else arguments)
        if switches.check:
            if int(os.environ.get("RANK", "0")) == 0:
                print(check(config))
            return 0
        trainer = prepare(config, switches)
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: the GPU's memory is full ({first_line(error)}) {LESS_BEFORE}", file=sys.stderr)
        return 1
    return run(trainer)


def run(trainer: Trainer) -> int:
    """Trains with a progress bar; returns the exit status."""
    quiet = not trainer.accelerator.is_main_process
    bar: tqdm[Any] = tqdm(total=trainer.config.optim.steps, initial=trainer.step, disable=quiet)

    def show(metrics: Metrics) -> None:
        shown = ("reward", "preference_loss", "grad_norm")
        bar.set_postfix({key: f"{metrics[key]:.3f}" for key in shown if key in metrics})
        bar.update(metrics["step"] + 1 - bar.n)

    with bar:
        status, message = outcome(trainer, show)
    if not quiet or status == 1:
        print(message, file=sys.stderr if status else sys.stdout)
    return status


def outcome(trainer: Trainer, show: Callable[[Metrics], None]) -> tuple[int, str]:
    """Trains; returns the exit status and the message at the end."""
    try:
        trainer.fit(show)
    except (KeyboardInterrupt, Stopped):
        return 130, f"Stopped after step {trainer.step}; run the same command again to resume."
    except torch.cuda.OutOfMemoryError as error:
        return 1, f"error: the GPU's memory is full ({first_line(error)}) {LESS_MEMORY}"
    except HyperAlignError as error:
        return 1, f"error: {error}"
    remark = warning(trainer.results.conditioning.get("shares", {}))
    return 0, "\n".join([f"Wrote {trainer.path}", *([remark] if remark else [])])


if __name__ == "__main__":
    sys.exit(main())
