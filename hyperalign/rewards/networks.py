"""What the reward networks share: precision, activation checkpointing, random weights on demand."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

State = dict[str, Tensor]

NOISE_LENGTH = 1_048_583
"""A prime, so that no two rows of a matrix filled with repeated noise are equal."""


def at_least_float32(x: Tensor) -> Tensor:
    """Returns half-precision values in float32, others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dtype_of(key: str, dtype: torch.dtype) -> torch.dtype:
    """Returns a tensor's dtype in a network of `dtype`: heads and the logit scale have float32 at least.

    In bfloat16 PickScore's factor of 100 would be 98.9.
    """
    precise = key.startswith("head.") or key.endswith("logit_scale")
    return torch.promote_types(dtype, torch.float32) if precise else dtype


def encoder_weight(network: nn.Module) -> Tensor:
    """Returns a weight with the encoder's device and dtype; the logit scale may have another dtype."""
    return next(weight for weight in network.parameters() if weight.dim() > 0)


@contextmanager
def without_autocast(network: nn.Module) -> Iterator[None]:
    """Disables autocast, so that a network computes in the precision of its weights."""
    with torch.autocast(encoder_weight(network).device.type, enabled=False):
        yield


def stacked_layers(network: nn.Module) -> list[nn.Module]:
    """Returns the transformer layers of a network."""
    stacks = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    return [layer for stack in stacks for layer in stack]


def set_checkpointing(network: nn.Module, enabled: bool) -> None:
    """Makes every transformer layer recompute its activations in the backward pass, to save memory.

    transformers' own switch works in training mode only and has different names in different releases.
    """
    for layer in stacked_layers(network):
        layer.__dict__.pop("forward", None)
        if enabled:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Assigns tensors to a network built on the meta device, and freezes it."""
    network.load_state_dict(state, assign=True)
    device = next(iter(state.values())).device
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # the encoders' only buffers are position ids, which no file contains
                positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
                module.register_buffer(name, positions, persistent=False)
    network.eval().requires_grad_(False)


def random_state(network: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> State:
    """Returns random weights for a network on the meta device.

    Every tensor repeats one block of noise from an offset of its own, scaled to its fan-in. This is much
    faster than sampling the 986 M parameters of ViT-H.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(NOISE_LENGTH, generator=generator).to(device)
    return {
        key: _random_like(key, value, noise).to(dtype_of(key, dtype))
        for key, value in network.state_dict().items()
    }


def _random_like(key: str, meta: Tensor, noise: Tensor) -> Tensor:
    if key.endswith("logit_scale"):
        return torch.full(meta.shape, math.log(100.0), device=noise.device)
    if key.endswith("bias"):
        return torch.zeros(meta.shape, device=noise.device)
    if meta.dim() == 1 and key.endswith("weight"):  # a layer norm
        return torch.ones(meta.shape, device=noise.device)
    noise = noise.roll(zlib.crc32(key.encode()) % NOISE_LENGTH) / math.sqrt(max(1, meta[0].numel()))
    return noise.repeat(-(-meta.numel() // NOISE_LENGTH))[: meta.numel()].view(meta.shape)
