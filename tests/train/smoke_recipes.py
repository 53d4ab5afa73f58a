"""The shipped recipes, cut down to three real steps on random weights that a small machine holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.config import TrainConfig
from train.preflight.smoke import smoke_config
from train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "train" / "recipes"


def cut_down(path: Path, out: Path, bf16: bool = False) -> TrainConfig:
    """Returns the smoke version of a recipe with rewards that fit a test.

    In float32 unless asked: processors without bfloat16 instructions convolve in it 70 times slower. A run
    in bfloat16 therefore has one image where the others have two.
    """
    config = smoke_config(load_recipe(path))
    if bf16:
        config = dataclasses.replace(
            config,
            objective=dataclasses.replace(config.objective, prompt_batch=1, preference_batch=1),
            validation=dataclasses.replace(config.validation, prompt_count=1),
        )
    rewards = (
        {"tiny reward": 1.0} if len(config.objective.rewards) == 1 else {"tiny reward": 1.0, "clip": 0.5}
    )
    return dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, rewards=rewards),
        network=dataclasses.replace(config.network, width=64, layers=1, heads=4),
        optim=dataclasses.replace(config.optim, bf16=bf16),
        run=dataclasses.replace(config.run, out=out),
    )
