"""`auto`: what a backward pass recomputes, and how many images it holds, chosen to fit a card."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import gather_object

from train.config import GradientCheckpointing, TrainConfig
from train.methods.passes import step_passes
from train.models.fsdp import uses_fsdp
from train.preflight.estimate import Memory, step_memory, step_work
from train.preflight.input_checks import GIB, autoencoder_of, backbone_of
from train.preflight.smoke import memory_bytes
from train.preflight.step_costs import StepCosts, step_costs

logger = logging.getLogger("hyperalign.train")
SHARE = 0.85
"""Share of a card's memory that the estimate may fill: it counts neither the kernels' scratch memory nor the
gaps of the allocator. Estimates came within a tenth of what an H100 held."""
USUAL_CARD = 80 * GIB
"""What a check without a GPU assumes."""
LAUNCHING = 2e13
"""Operations that an H100 could do while Python launches the kernels of a forward and backward pass: small
passes of SD 1.5 take 75 ms whatever they hold, at a reachable 280 TFLOP/s."""

Costs = Callable[[TrainConfig], StepCosts]


def is_automatic(config: TrainConfig) -> bool:
    """Whether a recipe leaves something to be chosen."""
    return "auto" in (config.objective.micro_batch, config.model.gradient_checkpointing)


def costs_of_folder(config: TrainConfig) -> StepCosts:
    """Returns the costs of a recipe's step with the base model of its folder. Raises HyperAlignError."""
    return step_costs(config, backbone_of(config), autoencoder_of(config))


def fitted_to(config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """Returns a recipe with `auto` replaced by what the smallest card of all processes takes, and logs it.

    The tiny model takes its batches at once. Raises HyperAlignError where the base model's folder cannot be
    read.
    """
    if not is_automatic(config):
        return config
    if config.model.base == "tiny":
        return with_choice(config, "none", config.objective.images_at_once)
    memory = min(gather_object([memory_bytes(accelerator.device)]))
    shards = accelerator.num_processes if uses_fsdp(accelerator) else 1
    found, _ = fitted(config, memory, costs_of_folder, shards)
    if accelerator.is_main_process:
        logger.warning("%s", described(found, memory))
    return found


def fitted(
    config: TrainConfig, memory: int, costs_of: Costs, shards: int = 1
) -> tuple[TrainConfig, StepCosts]:
    """Returns a recipe with `auto` replaced by the fastest choice that fits, by estimate, and its costs.

    A pass that recomputes less does fewer operations, but holds fewer images, and each pass costs the time
    of its launches. Where nothing fits, the choice that needs least memory is taken.

    Args:
        config: the recipe.
        memory: bytes of the card.
        costs_of: returns the costs of a recipe's step.
        shards: processes that the frozen backbone is spread over.
    """
    if not is_automatic(config):
        return config, costs_of(config)
    asked = config.model.gradient_checkpointing
    kinds: tuple[GradientCheckpointing, ...] = ("none", "decoder", "all") if asked == "auto" else (asked,)
    costs = {kind: costs_of(with_choice(config, kind, 0)) for kind in kinds}
    fits: list[tuple[TrainConfig, StepCosts]] = []
    for kind in kinds:
        for size in sizes(config):
            choice = with_choice(config, kind, size)
            if held(step_memory(choice, costs[kind]), shards) <= SHARE * memory:
                fits.append((choice, costs[kind]))
                break
    if not fits:
        return with_choice(config, kinds[-1], sizes(config)[-1]), costs[kinds[-1]]
    return min(fits, key=lambda fit: work_with_launches(*fit))


def what_fits(config: TrainConfig, memory: int, costs_of: Costs) -> str:
    """Returns what to set where a recipe needs more than a card has, by estimate; takes a minute."""
    found, costs = fitted(with_choice(config, "auto", "auto"), memory, costs_of)
    size, kind = found.objective.micro_batch, found.model.gradient_checkpointing
    chosen = f'objective.micro_batch = {size} and model.gradient_checkpointing = "{kind}"'
    needed = step_memory(found, costs).peak
    if needed <= SHARE * memory:
        return f"set {chosen}, which needs {needed / GIB:.1f} GiB"
    return (
        f"{chosen} still needs {needed / GIB:.1f} GiB. Set objective.conditional_only = true and "
        'model.vae = "taesd" too, lower objective.prompt_batch, or spread the backbone over several GPUs '
        "(train/recipes/accelerate/fsdp2.yaml)"
    )


def work_with_launches(config: TrainConfig, costs: StepCosts) -> float:
    """Returns the operations of a step, with those that its launches cost in time."""
    return step_work(config, costs).total + LAUNCHING * passes(config)


def with_choice(config: TrainConfig, kind: GradientCheckpointing, size: int | Literal["auto"]) -> TrainConfig:
    """Returns a recipe with what is recomputed, and the images of a pass; 0 takes all at once."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, gradient_checkpointing=kind),
        objective=dataclasses.replace(config.objective, micro_batch=size),
    )


def sizes(config: TrainConfig) -> list[int]:
    """Returns the images of a pass to try, the largest first: the batches in equal parts."""
    if config.objective.micro_batch != "auto":
        return [config.objective.micro_batch]
    largest = step_passes(config).largest_batch
    return sorted({math.ceil(largest / parts) for parts in range(1, largest + 1)}, reverse=True)


def passes(config: TrainConfig) -> int:
    """Returns the backward passes of a step."""
    o, step = config.objective, step_passes(config)
    batches = [images for images in (step.reward_batch, step.preference_batch) if images]
    return sum(math.ceil(images / (o.images_at_once or images)) for images in batches)


def held(memory: Memory, shards: int) -> float:
    """Returns the most bytes at once on one card, the frozen models spread over some."""
    return memory.peak - memory.weights * (1 - 1 / shards)


def described(config: TrainConfig, memory: int) -> str:
    """Returns the choice in words."""
    what = {"all": "backbone, decoder and rewards", "decoder": "decoder and rewards", "none": "nothing"}
    size = config.objective.images_at_once or step_passes(config).largest_batch
    return (
        f"auto: backward passes of {size} image{'s' * (size > 1)} recompute "
        f"{what[config.model.gradient_checkpointing]} (micro_batch = {config.objective.micro_batch}, "
        f'gradient_checkpointing = "{config.model.gradient_checkpointing}"), by estimate on '
        f"{memory / GIB:.0f} GiB"
    )
