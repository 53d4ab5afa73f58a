"""`--smoke`: a few real steps on a base model of true shape with random weights; nothing is downloaded."""

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

from hyperalign.rewards import loading
from hyperalign.rewards.networks import set_checkpointing
from train.config import TrainConfig
from train.inputs import evaluation, needs_images, origin, scoring
from train.materials import Materials, PromptList
from train.models.architectures import (
    FULL_SIZES,
    ModelSize,
    architecture,
    autoencoder,
    largest_within,
    with_random_weights,
)
from train.models.autoencoder import Autoencoder
from train.models.base import Conditions
from train.models.fsdp import shard_backbone, uses_fsdp
from train.models.load import backbone_dtype, make_base
from train.models.text_encoders import context_tokens, text_lengths

STEPS = 3
KEY_TIMES = (0.8, 0.5)
"""Of a recipe that would find its own: train/keytimes.py --smoke shows that."""
SIDE = 64
TEXT_LENGTHS = (32, 64)
SHARE = 0.3
"""Share of the machine's memory that the backbone may fill."""
PROMPTS = tuple(f"an image of {things}" for things in ("a dog", "an apple", "two cats", "three red hearts"))
TEXT = {"sd15": (768, 0), "sdxl": (2048, 1280), "flux": (4096, 768), "sd3": (4096, 2048)}
"""Widths of the text encoders' vectors and of the pooled vector."""


def smoke_config(config: TrainConfig) -> TrainConfig:
    """Returns the recipe cut down to three short steps at low resolution; what it trains stays.

    It has a run.out of its own, beside the recipe's, which stays as it is.
    """
    o, model, run = config.objective, config.model, config.run
    key_times = model.key_times or (KEY_TIMES if model.variant == "P" else ())
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, resolution=SIDE, vae="full", key_times=key_times),
        objective=dataclasses.replace(
            o, prompts=2, timesteps=1, rollout_steps=3, skip_first=min(o.skip_first, 2), preferred=2,
            micro_batch=1,
        ),
        optim=dataclasses.replace(config.optim, steps=STEPS, warmup=1),
        eval=dataclasses.replace(config.eval, every=STEPS, prompts=2, steps=2),
        data=dataclasses.replace(config.data, text_lengths=TEXT_LENGTHS),
        run=dataclasses.replace(run, save_every=2, out=run.out.parent / f"{run.out.name}_smoke"),
    )  # fmt: skip


def forget_last(config: TrainConfig, accelerator: Accelerator) -> None:
    """Removes the states of the smoke run before, so that this one takes all its steps."""
    with accelerator.main_process_first():
        for state in (config.run.out / "states").glob("*.pt"):
            state.unlink(missing_ok=True)


def memory_bytes(device: torch.device) -> int:
    """Returns the memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True, slots=True)
class RandomTexts:
    """Conditions of the true shape, decided by the words, behind the `PromptEncoder` protocol."""

    width: int
    pooled: int
    lengths: tuple[int, ...]
    device: torch.device

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Returns random vectors, the same for the same prompt."""
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
    """Random latents with captions, behind the `Preferred` protocol."""

    shape: tuple[int, int, int]

    def batch(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, list[str]]:
        """Returns latents (B, C, H, W) and captions."""
        del position
        latents = torch.from_numpy(rng.standard_normal((count, *self.shape), dtype=np.float32))
        rows = list(range(count))[part]
        return latents[part], [PROMPTS[row % len(PROMPTS)] for row in rows]


def smoke_shape(config: TrainConfig, device: torch.device) -> ModelSize:
    """Returns the true shape, or the largest one that fits the machine's memory."""
    size = 2 if config.optim.bf16 else 4
    return largest_within(config.model.base, int(SHARE * memory_bytes(device)) // size)


def described(config: TrainConfig, shape: ModelSize) -> str:
    """Returns what is run, in words."""
    true = FULL_SIZES[config.model.base]
    cut = "of true shape" if shape == true else f"cut down to fit the memory ({shape}, truly {true})"
    return f"{STEPS} steps on {config.model.base} with random weights, {cut}, at {SIDE} pixels"


def smoke_world(config: TrainConfig, accelerator: Accelerator, shape: ModelSize) -> Materials:
    """Returns materials with random weights, texts and images for a recipe from `smoke_config`."""
    device, dtype, name = accelerator.device, backbone_dtype(config), config.model.base
    with torch.device("meta"):
        backbone, decoder = architecture(name, shape), autoencoder(name)
    backbone = with_random_weights(backbone, device, dtype)
    if uses_fsdp(accelerator):
        shard_backbone(backbone)
    images = Autoencoder(with_random_weights(decoder, device, dtype), config.model.recomputes_images)
    base = make_base(config, backbone, images, "epsilon")
    width, pooled = TEXT[name]
    lengths = tuple(context_tokens(config, padding) for padding in text_lengths(config))
    texts = RandomTexts(width, pooled, lengths, device)
    rewards = {
        reward: loading.random_weights(reward, device=device, dtype=dtype)
        for reward in config.objective.rewards
    }
    for reward in rewards.values():
        set_checkpointing(reward.module, config.model.recomputes_images)
    return Materials(
        base=base,
        texts=texts,
        prompts=PromptList(list(PROMPTS)),
        preferred=RandomImages(base.latent_shape) if needs_images(config) else None,
        rewards=scoring(rewards, config.objective.rewards),
        evaluate=evaluation(config, base, texts, rewards, PROMPTS[: config.eval.prompts], accelerator),
        origin=origin(config),
    )
