"""`--smoke`: a recipe cut down to a few steps, on random texts and images; nothing is downloaded.

The base model has its true shape and random weights; `train.inputs.smoke_inputs` puts everything together.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from train.config import TrainConfig
from train.models.architectures import FULL_SIZES, ModelSize, largest_within
from train.models.base import Conditions

STEPS = 3
KEY_TIMES = (0.8, 0.5)
"""For a recipe that would measure its own, as train/keytimes.py --smoke does."""
SIDE = 64
TEXT_LENGTHS = (32, 64)
SHARE = 0.3
"""Share of the machine's memory that the backbone may fill."""
PROMPTS = tuple(f"a picture of {things}" for things in ("a dog", "an apple", "two cats", "three red hearts"))
TEXT_WIDTHS = {"sd15": (768, 0), "sdxl": (2048, 1280), "flux": (4096, 768), "sd3": (4096, 2048)}
"""Widths of the text encoders' vectors and of the pooled vector."""


def smoke_config(config: TrainConfig) -> TrainConfig:
    """Returns the recipe cut down to three short steps at low resolution; the hypernetwork is the same.

    Its run.out is another folder beside the recipe's.
    """
    o, model, run = config.objective, config.model, config.run
    key_times = model.key_times or (KEY_TIMES if model.variant == "P" else ())
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, resolution=SIDE, vae="full", key_times=key_times),
        objective=dataclasses.replace(
            o, prompt_batch=2, timesteps=1, rollout_steps=3, skip_first=min(o.skip_first, 2),
            preference_batch=2, micro_batch=1,
        ),
        optim=dataclasses.replace(config.optim, steps=STEPS, warmup_steps=1),
        validation=dataclasses.replace(config.validation, every=STEPS, prompt_count=2, steps=2),
        data=dataclasses.replace(config.data, text_lengths=TEXT_LENGTHS),
        run=dataclasses.replace(run, checkpoint_every=2, out=run.out.parent / f"{run.out.name}_smoke"),
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


@dataclass(frozen=True, slots=True)
class RandomTexts:
    """Random conditions of the true shape, equal for equal prompts, behind the `PromptEncoder` protocol."""

    width: int
    pooled: int
    lengths: tuple[int, ...]
    device: torch.device

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Returns random vectors, decided by the prompts."""
        length = self.lengths[zlib.crc32("\n".join(prompts).encode()) % len(self.lengths)]
        embeds = {
            "prompt_embeds": torch.stack([self._vectors(prompt, length, self.width) for prompt in prompts])
        }
        if self.pooled:
            pooled = torch.cat([self._vectors(prompt, 1, self.pooled) for prompt in prompts])
            embeds["pooled_prompt_embeds"] = pooled
        return {name: value.to(self.device) for name, value in embeds.items()}

    def _vectors(self, prompt: str, length: int, width: int) -> Tensor:
        return torch.randn(
            length, width, generator=torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        )


@dataclass(frozen=True, slots=True)
class RandomImages:
    """Random latents with captions, behind the `PreferenceDataset` protocol."""

    shape: tuple[int, int, int]

    def batch(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, list[str]]:
        """Returns latents (B, C, H, W) and captions."""
        del position
        latents = torch.from_numpy(rng.standard_normal((count, *self.shape), dtype=np.float32))
        return latents[part], [PROMPTS[index % len(PROMPTS)] for index in range(count)[part]]


def smoke_shape(config: TrainConfig, device: torch.device) -> ModelSize:
    """Returns the true shape, or the largest one that fits the machine's memory."""
    size = 2 if config.optim.bf16 else 4
    return largest_within(config.model.base, int(SHARE * memory_bytes(device)) // size)


def described(config: TrainConfig, shape: ModelSize) -> str:
    """Returns a sentence about the smoke run."""
    true = FULL_SIZES[config.model.base]
    cut = "of true shape" if shape == true else f"cut down to fit the memory ({shape}, truly {true})"
    return f"{STEPS} steps on {config.model.base} with random weights, {cut}, at {SIDE} pixels"
