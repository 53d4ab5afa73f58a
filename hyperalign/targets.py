"""What is adapted: the attention projections of a base model, by name and shape.

Names are diffusers' module paths; a `Place` says where ComfyUI keeps the same layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from .errors import shown

PerceptionMode = Literal["separate", "prefix"]
MAX_FEATURES = 1 << 20
"""Far above the widest layer of any base model."""
MAX_NAME = 300


@dataclass(frozen=True, slots=True)
class Target:
    """One adapted linear layer."""

    name: str
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        """Checks the values, which may come from a file's header. Raises ValueError."""
        name = cast(Any, self.name)
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
            raise ValueError(f"a layer is called {shown(name)}, expected a text of 1 to {MAX_NAME} letters")
        checked_width(self.in_features)
        checked_width(self.out_features)


def checked_width(value: Any) -> int:
    """Returns a number of channels. Raises ValueError for anything else."""
    if type(value) is not int or not 1 <= value <= MAX_FEATURES:
        raise ValueError(f"a width is {shown(value)}, expected a whole number from 1 to {MAX_FEATURES}")
    return value


@dataclass(frozen=True, slots=True)
class Place:
    """Where ComfyUI keeps a layer."""

    path: str
    """Module path inside `diffusion_model`."""
    first_row: int | None = None
    """First output of this layer in a fused one, such as the query of `qkv`; None where it is not fused."""


@dataclass(frozen=True, slots=True)
class LoraNames:
    """The keys of a layer in LoRA files of one family; the defaults are those of kohya's trainer."""

    prefix: str
    """What stands before diffusers' path of the layer."""
    dot: str = "_"
    """What a dot of the path becomes."""
    down: str = "lora_down"
    up: str = "lora_up"
    has_alpha: bool = True
    """Whether each layer has an alpha, by which loaders scale it: alpha / rank."""

    def keys(self, name: str) -> tuple[str, str, str | None]:
        """Returns the keys of a target's down and up matrix and of its alpha."""
        layer = self.prefix + name.replace(".", self.dot)
        alpha = f"{layer}.alpha" if self.has_alpha else None
        return f"{layer}.{self.down}.weight", f"{layer}.{self.up}.weight", alpha


class BaseSpec(Protocol):
    """The dimensions of a base model that decide whether a hypernetwork fits it."""

    @property
    def family(self) -> str:
        """The family's name, such as `sd15` or `flux`."""
        ...

    @property
    def last_timestep(self) -> float:
        """The model's timestep input at pure noise: u = t / last_timestep."""
        ...

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each feature map that perception reads."""
        ...

    @property
    def text_channels(self) -> int:
        """Width of the text tokens that the model reads."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Returns the dimensions as JSON types, as the checkpoint header stores them."""
        ...

    def targets(self, mode: PerceptionMode, perception_blocks: int = ...) -> tuple[Target, ...]:
        """Returns the adapted projections in forward order.

        In `prefix` mode the perception blocks of the same forward stay unadapted.
        """
        ...

    @property
    def lora_names(self) -> LoraNames:
        """How LoRA files of this family name layers, so that both hosts read the same file."""
        ...

    def place(self, name: str) -> Place:
        """Returns where ComfyUI keeps a target."""
        ...
