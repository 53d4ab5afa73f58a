"""What is adapted: the attention projections of a base model, by name and shape.

Names are diffusers' module paths; a `Place` says where ComfyUI keeps the same layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

PerceptionMode = Literal["separate", "prefix"]


@dataclass(frozen=True, slots=True)
class Target:
    """One adapted linear layer."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where ComfyUI keeps a layer."""

    path: str
    """Module path inside `diffusion_model`."""
    first_row: int | None = None
    """First output of this layer in a fused one, such as the query of `qkv`; None where it is not fused."""


class BaseSpec(Protocol):
    """The dimensions of a base model that decide whether a hypernetwork fits it."""

    @property
    def family(self) -> str:
        """The family's name, such as `sd15` or `flux`."""
        ...

    @property
    def last_timestep(self) -> float:
        """What the model is told of pure noise: u = t / last_timestep."""
        ...

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each feature map that perception reads."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Returns the dimensions as JSON types, as the checkpoint header stores them."""
        ...

    def targets(self, mode: PerceptionMode, perception_blocks: int = ...) -> tuple[Target, ...]:
        """Returns the adapted projections in forward order.

        In `prefix` mode the perception blocks of the same forward stay unadapted.
        """
        ...

    def place(self, name: str) -> Place:
        """Returns where ComfyUI keeps a target."""
        ...
