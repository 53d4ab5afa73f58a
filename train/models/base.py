"""What the trainer asks of a base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from hyperalign.hosts.diffusers.adapter import Call
from train.noise import NoiseSchedule

Conditions = dict[str, Tensor]
"""What the text encoders made of prompts: named tensors with one row a prompt."""


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
        """Whether guidance takes a second row without prompt; else the model has it as an input."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        ...

    def call(self, x_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Call:
        """Returns the backbone's arguments for rows (x, t, c)."""
        ...

    def prediction(self, output: Tensor, x_BCHW: Tensor) -> Tensor:
        """Returns the backbone's output in the shape of the latents, float32."""
        ...

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Returns images (B, 3, H, W), about [0, 1] and not clamped; keeps the graph."""
        ...

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Returns scaled latents of images in [0, 1], without gradient."""
        ...


class PromptEncoder(Protocol):
    """Where conditions come from: an encoder at hand or a cache on disk."""

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Returns the conditions of prompts, on the base model's device; "" is the empty prompt.

        Raises:
            HyperAlignError: a prompt cannot be encoded.
        """
        ...


def join(*parts: Conditions) -> Conditions:
    """Returns the rows of all parts, one after the other."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def take(conditions: Conditions, rows: slice) -> Conditions:
    """Returns some rows."""
    return {key: value[rows] for key, value in conditions.items()}


def repeat(conditions: Conditions, times: int) -> Conditions:
    """Returns all rows several times over."""
    return join(*[conditions] * times)


def cfg_conditions(
    base: Base, texts: PromptEncoder, prompts: Sequence[str]
) -> tuple[Conditions, Conditions | None]:
    """Returns the conditions of prompts and of as many empty ones, all at one padding.

    None in place of the latter where the base model takes the guidance as an input.
    """
    if not base.cfg:
        return texts.conditions(prompts), None
    rows = texts.conditions([*prompts, *[""] * len(prompts)])
    count = len(prompts)
    return take(rows, slice(0, count)), take(rows, slice(count, None))
