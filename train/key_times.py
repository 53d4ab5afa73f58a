"""Finds the key times of variant P on a base model: where x0-hat changes its pace.

python -m train.key_times --count 2
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from hyperalign.families.unet import LAST_TIMESTEP
from hyperalign.hosts.diffusers_tiny import TinyBase, load_tiny
from hyperalign.schedule import Schedule, find_key_times, relative_distance
from train.data import training_prompts
from train.evaluate import initial_noise
from train.rollout import Trajectory, rollout, trailing_timesteps

STEPS = 25
PROMPTS = 48


def distance_curve(
    base: TinyBase, *, prompts: int, steps: int, guidance: float, seed: int = 5
) -> list[float]:
    """Returns the mean relative distance of each evaluation's x0-hat to the one before it (Fig 4)."""
    texts = training_prompts(prompts, seed)
    context = base.encode_prompts(texts + [""] * len(texts))
    noise = torch.stack([initial_noise(i, seed) for i in range(prompts)]).to(base.device)
    path: Trajectory = rollout(base.unet, None, Schedule("I"), context, noise, steps=steps, guidance=guidance)
    pairs: list[tuple[Tensor, Tensor]] = list(zip(path.predictions[1:], path.predictions, strict=False))
    return [float(relative_distance(now, before).mean()) for now, before in pairs]


def base_key_times(base: TinyBase, *, count: int, guidance: float, steps: int = STEPS) -> tuple[float, ...]:
    """Returns `count` key times of a base model, as fractions of its noise range."""
    curve = distance_curve(base, prompts=PROMPTS, steps=steps, guidance=guidance)
    times = [t / LAST_TIMESTEP for t in trailing_timesteps(steps)[1:]]
    return find_key_times(curve, times, count)


@dataclass(frozen=True, slots=True)
class Options:
    """Finds key times on the embedded base model and prints them with the curve."""

    count: int = 2
    """Key times to find, besides the start of the run."""
    guidance: float = 4.0
    """Classifier-free guidance of the probing runs."""
    steps: int = STEPS
    """Sampling steps of the probing runs."""


def main() -> None:
    """Prints key times and the distance curve as JSON."""
    options = tyro.cli(Options)
    base = load_tiny()
    curve = distance_curve(base, prompts=PROMPTS, steps=options.steps, guidance=options.guidance)
    times = [t / LAST_TIMESTEP for t in trailing_timesteps(options.steps)[1:]]
    found = find_key_times(curve, times, options.count)
    rows = [{"u": round(u, 4), "distance": round(d, 4)} for u, d in zip(times, curve, strict=True)]
    print(json.dumps({"key_times": found, "curve": rows}, indent=1))


if __name__ == "__main__":
    main()
