"""`--check` of a recipe for the embedded tiny model."""

from __future__ import annotations

import shutil

from hyperalign.errors import HyperAlignError
from hyperalign.families.unet import TINY
from hyperalign.tiny.weights import part_path
from train.config import TrainConfig
from train.models.step_aware import check_step_aware
from train.preflight.input_checks import check_folder_writable, check_start, check_trackers, saved_step
from train.start import trained_numbers
from train.tiny.art import STYLES

PARTS = ("unet", "autoencoder", "text_encoder", "reward", "validation_reward", "detector", "style")


def check_tiny(config: TrainConfig) -> str:
    """Returns a summary of the run, without memory and speed.

    Raises:
        HyperAlignError: the first problem that would stop it later.
    """
    missing = [part_path(name).name for name in PARTS if not part_path(name).is_file()]
    if missing:
        raise HyperAlignError(
            f"The embedded model lacks {', '.join(missing)}. Rebuild it with `python train/tiny/build.py`."
        )
    check_folder_writable(config.run.out, "run.out")
    check_trackers(config)
    check_start(config, TINY)
    check_step_aware(config)
    step = saved_step(config)
    has_art = all((config.data.cache / "art" / f"{style}.json").exists() for style in STYLES)
    if not has_art and shutil.which("npm") is None:
        raise HyperAlignError(
            f"The emoji art is not in {config.data.cache / 'art'} and npm, which fetches it, was not found. "
            "Install Node.js, or copy the art there."
        )
    numbers, targets = trained_numbers(config, TINY), TINY.targets(config.model.mode)
    o = config.objective
    return "\n".join([
        f"recipe is sound: variant {config.model.variant}, {config.model.mode} perception, "
        f"{config.optim.steps} steps",
        f"hypernetwork: {numbers / 1e6:.2f} M parameters for {len(targets)} attention projections",
        f"a step: {o.prompt_batch} prompts x {o.rollout_steps} rollout steps, "
        f"{o.prompt_batch * o.timesteps} images with reward gradient, {o.preference_batch} preference images",
        f"resumes from step {step} in {config.run.out}" if step else f"starts anew in {config.run.out}",
        "not estimated for the embedded tiny model: peak memory, speed and the size of its checkpoints",
    ])  # fmt: skip
