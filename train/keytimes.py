"""Measures the relative-distance curve of a recipe's base model and finds the key times of variant P.

python train/keytimes.py --recipe train/recipes/tiny_p.toml
python train/keytimes.py --recipe train/recipes/sd15_p.toml --prompts 200 --steps 50 --out keytimes

Writes curve and key times to OUT.json and a plot to OUT.png. Copy the times into the recipe's
model.key_times, or leave that empty: training then finds them itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:
    # `python train/keytimes.py` puts train/ on the path, where train.py would hide the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import tyro
from accelerate import Accelerator
from matplotlib.figure import Figure

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line, replacing, write_text
from hyperalign.schedule import find_key_times
from train.config import TrainConfig
from train.inputs import SamplingInputs, reward_prompts, sampling_inputs, smoke_inputs
from train.preflight.smoke import smoke_config, smoke_shape
from train.recipe import load_recipe
from train.relative_distance import (
    PROMPTS,
    STEPS,
    curve_timesteps,
    distance_curve,
    measured_prompts,
    measuring_batch,
)


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure, and how many key times to find."""

    recipe: Path
    """Recipe whose base model, prompts and CFG scale are used."""
    out: Path = Path("keytimes")
    """Path of the results, without a suffix."""
    count: int = 0
    """Key times to find, besides the start; 0 takes the recipe's model.key_count."""
    prompts: int = PROMPTS
    """Prompts to average over."""
    steps: int = STEPS
    """Sampling steps."""
    smoke: bool = False
    """Random weights of true shape, to test that everything runs."""


def measure(options: Options) -> tuple[float, ...]:
    """Writes the curve and returns the key times. Raises HyperAlignError."""
    config = load_recipe(options.recipe)
    if options.smoke:
        config = smoke_config(config)
    inputs = measuring_inputs(config, options)
    guidance_scale = config.objective.guidance_scale
    batch = measuring_batch(config.objective.images_at_once)
    curve = distance_curve(
        inputs, prompts=options.prompts, steps=options.steps, guidance_scale=guidance_scale, batch=batch
    )
    times = curve_timesteps(inputs, options.steps)
    found = find_key_times(curve, times, options.count or config.model.key_count)
    rows = [{"u": round(u, 4), "distance": round(d, 5)} for u, d in zip(times, curve, strict=True)]
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}
    report = {"key_times": found, "guidance_scale": guidance_scale, "options": asked, "curve": rows}
    write_text(options.out.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    plot_curve(times, curve, found, options.out.with_suffix(".png"))
    return found


def measuring_inputs(config: TrainConfig, options: Options) -> SamplingInputs:
    """Returns base model and prompts: neither rewards nor preference images. Raises HyperAlignError."""
    accelerator = Accelerator()
    if options.smoke and (shape := smoke_shape(config, accelerator.device)) is not None:
        return smoke_inputs(config, accelerator, shape)
    prompts = reward_prompts(config)
    base, encoder = sampling_inputs(config, accelerator, measured_prompts(prompts, options.prompts))
    return SamplingInputs(base, encoder, prompts)


def plot_curve(
    times: Sequence[float], distances: Sequence[float], key_times: Sequence[float], path: Path
) -> None:
    """Writes the relative distances (log scale) over u from 1 to 0, key times marked, as a PNG."""
    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogy(times, distances, marker=".")
    axes.set_title("Relative distance of successive one-step predictions", pad=18)
    axes.set_xlabel("timestep u (1 is noise, 0 the image)")
    axes.set_xlim(1.0, 0.0)
    axes.grid(axis="y", alpha=0.4)
    for u in key_times:
        axes.axvline(u, color="tab:red")
        axes.annotate(f"{u:.3f}", (u, 1.02), xycoords=("data", "axes fraction"), ha="center", color="tab:red")
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        found = measure(options)
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(
            f"error: the GPU's memory is full ({first_line(error)}) Lower objective.micro_batch: so "
            "many prompts are sampled at once, 16 where it is 0. If 1 is too many, lower model.resolution or "
            "the longest of data.text_lengths.",
            file=sys.stderr,
        )
        return 1
    print(f"key_times = [{', '.join(f'{u:.4f}' for u in found)}]")
    print(f"Wrote {options.out.with_suffix('.json')} and {options.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
