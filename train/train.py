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

if not __package__:
    # `python train/train.py` puts train/ on the path, where this file would hide the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro  # noqa: E402
from tqdm import tqdm  # noqa: E402

from hyperalign.errors import HyperAlignError  # noqa: E402
from train.check import check  # noqa: E402
from train.config import TrainConfig, load_recipe  # noqa: E402


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
    with tqdm(total=config.optim.steps, initial=trainer.step, disable=not trainer.accelerator.is_main_process) as bar:
        try:
            trainer.fit(lambda row: _show(bar, row))
        except KeyboardInterrupt:
            bar.close()
            print(f"Stopped after step {trainer.step}; run the same command again to go on.", file=sys.stderr)
            return 130
    print(f"Wrote {trainer.path}")
    return 0


def _show(bar: "tqdm[None]", row: dict[str, object]) -> None:
    bar.set_postfix({key: f"{row[key]:.3f}" for key in ("reward", "preference_loss", "grad_norm") if key in row})
    bar.update()


if __name__ == "__main__":
    sys.exit(main())
