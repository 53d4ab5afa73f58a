"""`auto`: which recomputation and how many images in a backward pass fit a card and take least time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from hyperalign.errors import HyperAlignError
from train.config import GradientCheckpointing, ModelConfig, ObjectiveConfig, TrainConfig
from train.preflight.costs import NOTHING, Cost
from train.preflight.estimate import step_memory
from train.preflight.fit import (
    LAUNCHING,
    SHARE,
    costs_of_folder,
    described,
    fitted,
    fitted_to,
    is_automatic,
    passes,
    sizes,
    what_fits,
)
from train.preflight.step_costs import StepCosts
from train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
GIB = 2**30
KEPT = {"none": 4 * GIB, "decoder": 2 * GIB, "all": GIB // 2}
"""Bytes of one sample between its forward and backward pass, by what is recomputed."""
FORWARD = 1e12


def costs_of(config: TrainConfig) -> StepCosts:
    """Whole passes that recompute do a third more operations."""
    kept = KEPT[config.model.gradient_checkpointing]
    backward = (3 if config.model.recomputes_backbone else 2) * FORWARD
    sample = Cost(FORWARD, backward, kept, kept)
    return StepCosts(
        sampling=NOTHING, training=sample, perception=0.0, generation=NOTHING, decoding=NOTHING,
        scoring=NOTHING, parameters={"hypernetwork": 0}, targets=1, cfg=False,
    )  # fmt: skip


def recipe(
    micro_batch: Any = "auto", kind: GradientCheckpointing = "auto", *, prompts: int = 4, preferred: int = 6
) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(base="sd15", gradient_checkpointing=kind),
        objective=ObjectiveConfig(
            micro_batch=micro_batch, prompt_batch=prompts, timesteps=2, preference_batch=preferred
        ),
    )


def choice(config: TrainConfig, gib: float) -> tuple[str, Any]:
    found, _ = fitted(config, round(gib * GIB / SHARE), costs_of)
    return found.model.gradient_checkpointing, found.objective.micro_batch


def test_with_room_for_all_nothing_is_recomputed_and_each_loss_is_one_pass() -> None:
    assert choice(recipe(), 8 * 4 + 0.1) == ("none", 8)


def test_the_parts_of_a_batch_are_equal() -> None:
    assert sizes(recipe()) == [8, 4, 3, 2, 1]
    assert sizes(recipe(5)) == [5]


def test_less_recomputation_loses_where_its_passes_are_too_many() -> None:
    """Without recomputation one image fits: 14 passes; with the decoder's two fit; with all eight."""
    saved_by_none = (8 + 6) * FORWARD  # operations that only the backbone's recomputation does
    assert LAUNCHING * (14 - 2) > saved_by_none
    assert choice(recipe(), 4.1) == ("all", 8)


def test_of_equal_operations_fewer_passes_win() -> None:
    assert choice(recipe(), 16.1) == ("decoder", 8)  # without recomputation: 4 images, 4 passes instead of 2


def test_what_the_recipe_says_is_kept() -> None:
    assert choice(recipe(3), 12.1) == ("none", 3)
    assert choice(recipe(3), 6.1) == ("decoder", 3)
    assert choice(recipe("auto", "none"), 12.1) == ("none", 3)
    config = recipe(3, "all")
    assert not is_automatic(config)
    assert fitted(config, 1, costs_of) == (config, costs_of(config))


def test_where_nothing_fits_the_least_memory_is_taken() -> None:
    assert choice(recipe(), 0.1) == ("all", 1)
    assert choice(recipe("auto", "none"), 0.1) == ("none", 1)


def test_a_recipe_too_large_is_told_what_to_set_and_to_what() -> None:
    config = recipe(0, "none")
    assert what_fits(config, round(16.1 * GIB / SHARE), costs_of) == (
        'set objective.micro_batch = 8 and model.gradient_checkpointing = "decoder", which needs 16.0 GiB'
    )
    assert what_fits(config, GIB // 10, costs_of).startswith(
        'objective.micro_batch = 1 and model.gradient_checkpointing = "all" still needs 0.5 GiB. Set '
        "objective.conditional_only = true"
    )


def test_frozen_models_that_are_spread_over_cards_leave_room() -> None:
    def heavy(config: TrainConfig) -> StepCosts:
        found = costs_of(config)
        return dataclasses.replace(found, parameters={"hypernetwork": 0, "backbone": 16 * GIB})

    memory = round(40.1 * GIB / SHARE)  # 32 GiB of weights in bfloat16, and 8 images with all recomputed
    found, _ = fitted(recipe(), memory, heavy)
    assert found.objective.micro_batch == 8
    assert found.model.gradient_checkpointing == "all"
    spread, _ = fitted(recipe(), memory, heavy, shards=4)
    assert spread.model.gradient_checkpointing == "none"


def test_passes_are_counted_for_each_loss() -> None:
    assert passes(recipe(0)) == 2
    assert passes(recipe(4)) == 2 + 2
    no_reward = dataclasses.replace(recipe(4).objective, reward_weight=0.0)
    assert passes(dataclasses.replace(recipe(4), objective=no_reward)) == 2


def test_the_tiny_model_takes_all_at_once_and_recomputes_nothing() -> None:
    config = TrainConfig(
        model=ModelConfig(gradient_checkpointing="auto"), objective=ObjectiveConfig(micro_batch="auto")
    )
    found = fitted_to(config, Accelerator(cpu=True))
    assert (found.model.gradient_checkpointing, found.objective.micro_batch) == ("none", 0)


def test_the_choice_for_sd15_fits_its_card() -> None:
    found, costs = fitted(load_recipe(RECIPES / "sd15_s.toml"), 24 * GIB, costs_of_folder)
    assert not is_automatic(found)
    assert costs == costs_of_folder(found)
    assert step_memory(found, costs).peak <= SHARE * 24 * GIB


def test_the_choice_is_said_in_words() -> None:
    found, _ = fitted(recipe(), round(16.1 * GIB / SHARE), costs_of)
    assert described(found, 80 * GIB) == (
        "auto: backward passes of 8 images recompute decoder and rewards (micro_batch = 8, "
        'gradient_checkpointing = "decoder"), by estimate on 80 GiB'
    )
    assert "passes of 1 image recompute backbone, decoder and rewards" in described(recipe(1, "all"), GIB)


def test_a_word_that_is_not_auto_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[objective]\nmicro_batch = "atuo"\n')
    with pytest.raises(HyperAlignError, match="micro_batch is 'atuo'; expected a whole number or 'auto'"):
        load_recipe(path)
    path.write_text("[objective]\nmicro_batch = 2.5\n")
    with pytest.raises(HyperAlignError, match="micro_batch is 2.5; expected a whole number or 'auto'"):
        load_recipe(path)
    path.write_text('[objective]\nmicro_batch = "auto"\n')
    assert load_recipe(path).objective.micro_batch == "auto"
    path.write_text("[objective]\nmicro_batch = -1\n")
    with pytest.raises(HyperAlignError, match="objective.micro_batch is -1; expected 0 or more, or auto"):
        load_recipe(path)
