"""Trains a hypernetwork from a recipe.

python train/train.py --recipe train/recipes/tiny_s.toml
python train/train.py --recipe train/recipes/tiny_s.toml --optim.lr 1e-4 --run.out runs/mine
accelerate launch train/train.py --recipe train/recipes/tiny_s.toml
python train/train.py --recipe train/recipes/tiny_s.toml --check
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:
    # `python train/train.py` puts train/ on the path, where this file would hide the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro
from tqdm import tqdm

from hyperalign.errors import HyperAlignError
from train.check import check
from train.config import TrainConfig, load_recipe


def parse(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """Returns the configuration and whether only to check it. Raises HyperAlignError."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", type=Path)
    first.add_argument("--check", action="store_true")
    known, rest = first.parse_known_args(arguments)
    default = load_recipe(known.recipe) if known.recipe else TrainConfig()
    config = tyro.cli(TrainConfig, args=rest, default=default, description=__doc__)
    return config, known.check


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        config, check_only = parse(sys.argv[1:] if arguments is None else arguments)
        if check_only:
            print(check(config))
            return 0
        from train.loop import Trainer

        trainer = Trainer(config)
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    quiet = not trainer.accelerator.is_main_process
    bar: tqdm[Any] = tqdm(total=config.optim.steps, initial=trainer.step, disable=quiet)

    def show(row: dict[str, Any]) -> None:
        figures = ("reward", "preference_loss", "grad_norm")
        bar.set_postfix({key: f"{row[key]:.3f}" for key in figures if key in row})
        bar.update()

    try:
        trainer.fit(show)
    except KeyboardInterrupt:
        print(f"\nStopped after step {trainer.step}; run the same command again to go on.", file=sys.stderr)
        return 130
    finally:
        bar.close()
    print(f"Wrote {trainer.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
