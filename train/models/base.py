"""The protocols of base models and prompt encoders in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from hyperalign.hosts.diffusers.adapter import Call
from train.noise import NoiseSchedule

Conditions = dict[str, Tensor]
"""Outputs of the text encoders: named tensors with one row per prompt."""


class Base(Protocol):
    """A frozen base model in diffusers' classes, with its conventions."""

    @property
    def backbone(self) -> nn.Module:
        """The U-Net or transformer."""
        ...

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """How noise is mixed in, and what the backbone predicts."""
        ...

    @property
    def cfg(self) -> bool:
        """Whether guidance needs an unconditional sample; otherwise the model takes it as an input."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        ...

    def call(self, x_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Call:
        """Returns the arguments of the backbone for a batch of latents, timesteps and conditions."""
        ...

    def prediction(self, output: Tensor, x_BCHW: Tensor) -> Tensor:
        """Returns the output of the backbone in the shape of the latents, in float32."""
        ...

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Returns images (B, 3, H, W), about [0, 1] and not clamped; keeps the graph."""
        ...

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Returns scaled latents of images in [0, 1], without gradient."""
        ...


class PromptEncoder(Protocol):
    """Conditions from a text encoder or from a cache on disk."""

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Returns the conditions of prompts, on the base model's device; "" is the empty prompt.

        Raises:
            HyperAlignError: a prompt cannot be encoded.
        """
        ...


def join(*parts: Conditions) -> Conditions:
    """Concatenates conditions along the batch."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def take(conditions: Conditions, rows: slice | list[int]) -> Conditions:
    """Returns the conditions of some samples of the batch."""
    return {key: value[rows] for key, value in conditions.items()}


def repeat(conditions: Conditions, times: int) -> Conditions:
    """Repeats the whole batch."""
    return join(*[conditions] * times)


def with_guidance(base: Base, conditions: Conditions, guidance_scale: float) -> Conditions:
    """Returns the conditions with the guidance (B,), if the base model takes it as an input."""
    if base.cfg:
        return conditions
    rows = len(next(iter(conditions.values())))
    return {**conditions, "guidance": torch.full((rows,), guidance_scale, device=base.device)}


def cfg_conditions(
    base: Base, encoder: PromptEncoder, prompts: Sequence[str], guidance_scale: float
) -> tuple[Conditions, Conditions | None]:
    """Returns the conditions of prompts and of as many empty prompts, all at one padding.

    The latter are None if the base model takes the guidance as an input.
    """
    if not base.cfg:
        return with_guidance(base, encoder.conditions(prompts), guidance_scale), None
    count = len(prompts)
    both = encoder.conditions([*prompts, *[""] * count])
    return take(both, slice(0, count)), take(both, slice(count, None))
