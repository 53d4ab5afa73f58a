"""What makes the frozen models faster on a GPU and changes no result but its rounding."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hyperalign.rewards.networks import stacked_layers
from train.config import ModelConfig
from train.models.latent_model import LatentModel

GRAPHS = 64
"""Of one kind of block: its widths, sizes and batches, adapted and not, with gradient and without. Beyond 8,
PyTorch's own limit, blocks would run uncompiled."""


def speed_up(
    config: ModelConfig, base: LatentModel, rewards: Iterable[nn.Module], backend: str = "inductor"
) -> None:
    """Does what a recipe asks for.

    Args:
        config: asks for `channels_last` and `compile`.
        base: its U-Net and decoder are laid out with channels last; its transformer blocks are compiled, not
            the decoder: the compiled backward pass of its group norms refuses the gradient's layout.
        rewards: networks whose layers are compiled.
        backend: of torch.compile.
    """
    backbone: Any = base.backbone
    decoder: Any = base.autoencoder.module.decoder
    if config.channels_last:
        for module in (backbone, decoder):
            module.to(memory_format=torch.channels_last)
    if config.compile:
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        dynamo.recompile_limit = max(GRAPHS, dynamo.recompile_limit)
        layers = [layer for network in rewards for layer in stacked_layers(network)]
        for module in (*repeated_blocks(backbone), *layers):
            module.compile(backend=backend)


def repeated_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Returns a backbone's transformer blocks, which are alike, so that they compile once."""
    model: Any = backbone
    names = model._repeated_blocks or [type(model.transformer_blocks[0]).__name__]  # SD 3.5's has no list
    return [module for module in model.modules() if type(module).__name__ in names]
