"""The embedded tiny model's world as training materials: grammar prompts, EmojiScenes, its own judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hyperalign.checkpoint import HyperAlign
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.tiny.evaluators import load_reward
from hyperalign.tiny.text_encoder import tokenize_batch
from train.config import TrainConfig
from train.data.prompts import load_prompts
from train.data.shards import LatentShards
from train.image_grid import save_grid
from train.materials import Materials, Preferred, PromptList, Prompts, ShardImages
from train.models.attention import use_float32_attention
from train.models.image_encoder import image_encoder
from train.models.tiny import Tiny
from train.objective import RewardFn, Rewards
from train.runtime import Row
from train.tiny.dataset import PreferenceLatents, preference_latents, training_prompts
from train.tiny.evaluate import metrics, sample_all


@dataclass(frozen=True, slots=True)
class GrammarPrompts:
    """Prompts of the training split, families drawn uniformly."""

    def draw(self, count: int, rng: np.random.Generator) -> list[str]:
        """Returns `count` prompts."""
        return training_prompts(count, int(rng.integers(2**31)))


@dataclass(frozen=True, slots=True)
class Scenes:
    """Encoded EmojiScenes, drawn independently."""

    images: PreferenceLatents

    def batch(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, list[str]]:
        """Returns latents (B, 4, 16, 16) and captions."""
        del position
        rows = rng.integers(len(self.images.latents), size=count)[part]
        return self.images.latents[torch.from_numpy(rows)], [self.images.captions[row] for row in rows]


def tiny_reward(device: torch.device) -> RewardFn:
    """Returns the preference reward of images (B, 3, 64, 64), about [0, 1]; keeps the graph."""
    network = load_reward().eval().requires_grad_(False).to(device)

    def score(images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return network(images_BCHW.clamp(0.0, 1.0), tokenize_batch(list(prompts)).to(device))

    return score


def tiny_prompts(config: TrainConfig) -> Prompts:
    """Returns the grammar's prompts, or those of data.prompts. Raises HyperAlignError on unknown words."""
    if config.data.prompts == Path():
        return GrammarPrompts()
    prompts = load_prompts(config.data.prompts)
    tokenize_batch(prompts)
    return PromptList(prompts)


def tiny_images(config: TrainConfig, base: Tiny) -> Preferred:
    """Returns EmojiScenes, or the latent shards of data.preferred. Raises HyperAlignError."""
    if config.data.preferred == Path():
        return Scenes(preference_latents(base.model, config.data))
    encoder = image_encoder(config, base.device)
    return ShardImages(
        LatentShards(config.data.preferred, encoder.fingerprint, encoder.resolution), config.run.seed
    )


def tiny_materials(config: TrainConfig, device: torch.device, is_main: bool = True) -> Materials:
    """Returns the embedded model's world. Raises HyperAlignError if a part of it is missing."""
    base = Tiny(load_tiny(device))
    if config.optim.bf16 and device.type == "cpu":
        use_float32_attention(base.model.unet)

    def evaluate(hyperalign: HyperAlign, grid: Path) -> Row:
        if not is_main:
            return {}
        samples = sample_all(
            base, hyperalign, config.eval.prompts, seeds=(0,), steps=config.eval.steps,
            guidance=config.objective.guidance, bf16=config.optim.bf16,
        )  # fmt: skip
        save_grid(samples, grid)
        return metrics(samples)

    return Materials(
        base=base,
        texts=base,
        prompts=tiny_prompts(config),
        preferred=tiny_images(config, base),
        rewards=Rewards({"tiny reward": tiny_reward(device)}, config.objective.rewards),
        evaluate=evaluate,
        origin={
            "reward": "tiny preference reward (hyperalign/tiny/weights/reward.safetensors)",
            "preference_data": "EmojiScenes, right captions, Fluent style (Fluent Emoji, MIT)",
        },
    )
