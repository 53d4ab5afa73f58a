"""The key times of variant P: where a base model's one-step predictions x0-hat change fastest (Fig 4)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hyperalign.schedule import Schedule, find_key_times, relative_distance
from train.config import TrainConfig
from train.data.streams import Prompts
from train.inputs import SamplingInputs
from train.models.base import cfg_conditions
from train.models.fsdp import uses_fsdp
from train.randomness import StepRandomness, normal
from train.rollout import rollout

logger = logging.getLogger("hyperalign.train")
STEPS = 25
PROMPTS = 48
SEED = 5
BATCH = 16


def weight_schedule(
    config: TrainConfig, inputs: SamplingInputs, accelerator: Accelerator, saved: Sequence[float] | None
) -> Schedule:
    """Returns when weights are generated; key times that P's recipe leaves open are measured once.

    The main process measures for all; a backbone that is sharded over the processes needs all of them.

    Args:
        config: the recipe.
        inputs: the base model and prompts to measure on.
        accelerator: the processes of the run.
        saved: key times of the checkpoint that the run resumes from.
    """
    model, objective = config.model, config.objective
    if model.variant != "P" or model.key_times:
        return config.schedule()
    if saved is not None:
        return Schedule("P", tuple(saved))
    found: list[tuple[float, ...]] = [()]
    if accelerator.is_main_process or uses_fsdp(accelerator):
        found[0] = base_key_times(
            inputs, count=model.key_count, guidance_scale=objective.guidance_scale,
            batch=measuring_batch(objective.images_at_once),
        )  # fmt: skip
        logger.info("key times of the base model: %s", ", ".join(f"{u:.3f}" for u in found[0]))
    return Schedule("P", tuple(broadcast_object_list(found)[0]))


def distance_curve(
    inputs: SamplingInputs,
    *,
    prompts: int,
    steps: int,
    guidance_scale: float,
    batch: int = BATCH,
    seed: int = SEED,
) -> list[float]:
    """Returns the mean relative distance of each evaluation's x0-hat to the one before it (Fig 4).

    At most `batch` prompts are sampled at once.
    """
    base, encoder = inputs.base, inputs.encoder
    rng = _randomness(seed)
    chosen = inputs.prompts.sample(prompts, rng)
    noise = normal((prompts, *base.latent_shape), rng).to(base.device)
    totals = [0.0] * (steps - 1)
    for first in range(0, prompts, batch):
        chunk = chosen[first : first + batch]
        cond, uncond = cfg_conditions(base, encoder, chunk, guidance_scale)
        trajectory = rollout(
            base, None, Schedule("I"), cond, uncond, noise[first : first + batch],
            steps=steps, guidance_scale=guidance_scale,
        )  # fmt: skip
        x0 = trajectory.predictions
        for index, (before, now) in enumerate(pairwise(x0)):
            totals[index] += float(relative_distance(now, before).sum())
    return [total / prompts for total in totals]


def measured_prompts(prompts: Prompts, count: int) -> list[str]:
    """Returns the prompts that `distance_curve` samples, so that only they need to be encoded."""
    return prompts.sample(count, _randomness(SEED))


def _randomness(seed: int) -> np.random.Generator:
    return StepRandomness(seed, 0).generator(1)


def curve_timesteps(inputs: SamplingInputs, steps: int) -> list[float]:
    """Returns the fraction u of each point of the curve: the later one of its two timesteps."""
    noise = inputs.base.noise_schedule
    return [t / noise.last_timestep for t in noise.timesteps(steps)[1:]]


def measuring_batch(micro_batch: int) -> int:
    """Returns how many prompts are sampled at once under `objective.micro_batch`, where 0 sets no limit."""
    return min(BATCH, micro_batch or BATCH)


def base_key_times(
    inputs: SamplingInputs,
    *,
    count: int,
    guidance_scale: float,
    steps: int = STEPS,
    prompts: int = PROMPTS,
    batch: int = BATCH,
) -> tuple[float, ...]:
    """Returns `count` key times of a base model, as fractions u of its noise schedule."""
    curve = distance_curve(inputs, prompts=prompts, steps=steps, guidance_scale=guidance_scale, batch=batch)
    return find_key_times(curve, curve_timesteps(inputs, steps), count)
