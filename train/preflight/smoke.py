"""`--smoke`: a recipe cut down to a few steps, on random inputs; nothing is downloaded.

The base model has its true shape and random weights, or the largest shape that fits the memory.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import torch
from accelerate import Accelerator

from train.config import TrainConfig
from train.models.architectures import FULL_SIZES, ModelSize, largest_within

logger = logging.getLogger("hyperalign.train")
STEPS = 3
KEY_TIMES = (0.8, 0.5)
"""For a recipe that would measure its own, as train/keytimes.py --smoke does."""
SIDE = 64
TEXT_LENGTHS = (32, 64)
SHARE = 0.3
"""Share of the machine's memory that the backbone may fill."""


def smoke_config(config: TrainConfig) -> TrainConfig:
    """Returns the recipe cut down to three short steps at low resolution; the hypernetwork is the same.

    Its run.out is another folder beside the recipe's.
    """
    o, model, run, spo = config.objective, config.model, config.run, config.spo
    if model.base == "tiny":  # its weights are not random, and need no other file
        spo = dataclasses.replace(spo, step_reward=Path())
    key_times = model.key_times or (KEY_TIMES if model.variant == "P" else ())
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model, resolution=SIDE, vae="full", key_times=key_times, statistics_prompts=2,
            gradient_checkpointing="all" if model.recomputes_backbone else model.gradient_checkpointing,
        ),
        objective=dataclasses.replace(
            o, prompt_batch=2, timesteps=1, rollout_steps=3, skip_first=min(o.skip_first, 2),
            preference_batch=2, micro_batch=1,
        ),
        grpo=dataclasses.replace(config.grpo, group=max(2, config.grpo.updates)),
        optim=dataclasses.replace(config.optim, steps=STEPS, warmup_steps=1),
        validation=dataclasses.replace(
            config.validation, every=STEPS, prompt_count=2, steps=2, diversity_encoder=Path()
        ),
        data=dataclasses.replace(config.data, text_lengths=TEXT_LENGTHS),
        spo=spo,
        run=dataclasses.replace(
            run, checkpoint_every=2, init_from=Path(), out=run.out.parent / f"{run.out.name}_smoke"
        ),
    )  # fmt: skip


def remove_checkpoints(config: TrainConfig, accelerator: Accelerator) -> None:
    """Removes the checkpoints of an earlier smoke run, so that this one takes all its steps."""
    with accelerator.main_process_first():
        for path in (config.run.out / "checkpoints").glob("*.pt"):
            path.unlink(missing_ok=True)


def memory_bytes(device: torch.device) -> int:
    """Returns the memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def smoke_shape(config: TrainConfig, device: torch.device) -> ModelSize | None:
    """Returns the true shape, or the largest one that fits the machine's memory, and logs which.

    The embedded tiny model has None: a smoke run takes it as it is.
    """
    if config.model.base == "tiny":
        return None
    size = 2 if config.optim.bf16 else 4
    shape = largest_within(config.model.base, int(SHARE * memory_bytes(device)) // size)
    logger.warning("smoke run: %s", described(config, shape))
    return shape


def described(config: TrainConfig, shape: ModelSize) -> str:
    """Returns a sentence about the smoke run."""
    true = FULL_SIZES[config.model.base]
    cut = "of true shape" if shape == true else f"cut down to fit the memory ({shape}, truly {true})"
    return f"{STEPS} steps on {config.model.base} with random weights, {cut}, at {SIDE} pixels"
