"""The rows of the paper's tables: what is trained, by which recipe, and what is sampled how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from hyperalign.errors import HyperAlignError
from train.config import BaseName, TrainConfig
from train.methods.passes import step_passes
from train.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "train" / "recipes"
Group = Literal["base model", "test time", "static LoRA", "hypernetwork", "Table 3"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row."""

    key: str
    """Its name in --rows, and of its folders."""
    title: str
    group: Group
    recipe: str = ""
    """File in train/recipes, with BASE for the base model's name; empty where nothing is trained."""
    changes: tuple[str, ...] = ()
    """Options of train.py that change the recipe."""
    sampling: tuple[str, ...] = ()
    """Options of generate.py."""

    def recipe_path(self, base: BaseName) -> Path:
        """Returns the file of the recipe."""
        return RECIPES / f"{self.recipe.replace('BASE', base)}.toml"

    def config(self, base: BaseName, changes: tuple[str, ...] = ()) -> TrainConfig:
        """Returns the recipe with its changes and others. Raises HyperAlignError where there is none."""
        path = self.recipe_path(base)
        if not path.is_file():
            raise HyperAlignError(
                f"{self.title} has no recipe for {base}: {path} is missing. Leave {self.key} out of --rows."
            )
        return tyro.cli(TrainConfig, args=[*self.changes, *changes], default=load_recipe(path))


def _test_time(key: str, title: str, name: str, *options: str) -> Row:
    return Row(key, title, "test time", sampling=("--test-time", name, *options))


def _static(key: str, title: str) -> Row:
    return Row(key, title, "static LoRA", f"methods/BASE_{key.replace('-', '_')}")


def _ours(key: str, title: str, group: Group, *changes: str) -> Row:
    return Row(key, title, group, "BASE_s", changes)


S = ("--network.conditioning", "full")
"""Makes HyperAlign-S of a static LoRA's recipe."""
ROWS = (
    Row("base", "base model", "base model"),
    _test_time("best-of-n", "best of 20", "best-of-N", "--search.candidates", "20"),
    _test_time("epsilon-greedy", "epsilon-greedy, 20 x 4 a step", "epsilon-greedy-steps"),
    _test_time("das", "DAS", "das", "--das.alpha", "1e-4"),
    _test_time("freedom", "FreeDoM", "freedom"),
    _test_time("dymo", "DyMO", "dymo"),
    _static("alignprop", "AlignProp"),
    _static("draft", "DRaFT-1"),
    _static("dpo", "Diffusion-DPO"),
    _static("kto", "Diffusion-KTO"),
    _static("spo", "SPO"),
    _static("dance-grpo", "DanceGRPO"),
    _static("mix-grpo", "MixGRPO"),
    _static("srpo", "SRPO"),
    _static("sft", "fine-tuning on preferred images"),
    _static("reward-only", "reward only"),
    Row("static", "static LoRA, both losses", "static LoRA", "BASE_static"),
    _ours("hyperalign-i", "HyperAlign-I", "hypernetwork", "--model.variant", "I"),
    _ours("hyperalign-p", "HyperAlign-P", "hypernetwork", "--model.variant", "P"),
    _ours("hyperalign-s", "HyperAlign-S", "hypernetwork"),
    _ours("s-preference-only", "S, preferred images only", "Table 3", "--objective.reward-weight", "0"),
    Row("s-reward-only", "S, reward only", "Table 3", "methods/BASE_reward_only", S),
)
"""In the tables' order."""


def steps_of(config: TrainConfig, budget: float, cfg: bool) -> int:
    """Returns how many steps a budget of passes allows; the recipe's where it is 0.

    Raises HyperAlignError where it allows none.
    """
    if not budget:
        return config.optim.steps
    each = step_passes(config).of_backbone(cfg).total
    if (steps := round(budget / each)) < 1:
        raise HyperAlignError(
            f"--budget is {budget:g} passes, and one step of {config.objective.method} takes "
            f"{each:g}. Raise it."
        )
    return steps


def chosen_rows(names: tuple[str, ...]) -> list[Row]:
    """Returns the rows of these names in the tables' order, the base model first; all where there are none.

    Raises HyperAlignError on an unknown name.
    """
    known = [row.key for row in ROWS]
    if unknown := [name for name in names if name not in known]:
        raise HyperAlignError(f"There is no row {', '.join(unknown)}; expected some of {', '.join(known)}.")
    return [row for row in ROWS if not names or row.key == "base" or row.key in names]
