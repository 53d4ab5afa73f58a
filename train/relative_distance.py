"""The key times of variant P: where a base model's one-step predictions change their pace."""

from __future__ import annotations

from hyperalign.schedule import Schedule, find_key_times, relative_distance
from train.materials import Materials
from train.models.base import cfg_conditions
from train.randomness import Draws, normal
from train.rollout import rollout

STEPS = 25
PROMPTS = 48
BATCH = 16


def distance_curve(
    materials: Materials, *, prompts: int, steps: int, guidance: float, batch: int = BATCH, seed: int = 5
) -> list[float]:
    """Returns the mean relative distance of each evaluation's x0-hat to the one before it (Fig 4).

    At most `batch` prompts are sampled at once.
    """
    base, texts = materials.base, materials.texts
    rng = Draws(seed, 0).generator(1)
    drawn = materials.prompts.draw(prompts, rng)
    noise = normal((prompts, *base.latent_shape), rng).to(base.device)
    totals = [0.0] * (steps - 1)
    for first in range(0, prompts, batch):
        chunk = drawn[first : first + batch]
        cond, uncond = cfg_conditions(base, texts, chunk)
        path = rollout(
            base, None, Schedule("I"), cond, uncond, noise[first : first + batch],
            steps=steps, guidance=guidance,
        )  # fmt: skip
        for index, (before, now) in enumerate(zip(path.predictions, path.predictions[1:], strict=False)):
            totals[index] += float(relative_distance(now, before).sum())
    return [total / prompts for total in totals]


def curve_times(materials: Materials, steps: int) -> list[float]:
    """Returns u of each point of the curve."""
    process = materials.base.process
    return [t / process.last_time for t in process.times(steps)[1:]]


def measuring_batch(micro_batch: int) -> int:
    """Returns how many prompts are sampled at once under `objective.micro_batch`, where 0 sets no limit."""
    return min(BATCH, micro_batch or BATCH)


def base_key_times(
    materials: Materials,
    *,
    count: int,
    guidance: float,
    steps: int = STEPS,
    prompts: int = PROMPTS,
    batch: int = BATCH,
) -> tuple[float, ...]:
    """Returns `count` key times of a base model, as fractions of its noise range."""
    curve = distance_curve(materials, prompts=prompts, steps=steps, guidance=guidance, batch=batch)
    return find_key_times(curve, curve_times(materials, steps), count)
