"""The rewards of a recipe, in the precision of its frozen models unless another is asked for."""

from __future__ import annotations

import torch

from hyperalign.rewards import Reward, loading
from hyperalign.rewards.networks import set_checkpointing
from train.config import TrainConfig
from train.models.load import backbone_dtype


def load_reward(
    config: TrainConfig, name: str, device: torch.device, dtype: torch.dtype | None = None
) -> Reward:
    """Returns one reward, frozen. Raises HyperAlignError if it is unknown or its files are not there."""
    tokenizer = config.model.path / "tokenizer"
    reward = loading.load(
        name, config.data.rewards, device=device, dtype=backbone_dtype(config) if dtype is None else dtype,
        tokenizer_folder=tokenizer if tokenizer.is_dir() else None,
    )  # fmt: skip
    set_checkpointing(reward.module, config.model.recomputes_images)
    return reward
