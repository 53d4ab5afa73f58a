"""What diffusion transformers share: stacks of blocks whose projections ComfyUI fuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import HyperAlignError
from ..targets import LoraNames, PerceptionMode, Place, Target


@dataclass(frozen=True, slots=True)
class Projection:
    """One attention projection of a block, width to width."""

    name: str
    """Path in diffusers' block."""
    comfy: str
    """Path in ComfyUI's block."""
    part: int | None = None
    """Which part of a fused layer it is: 0 query, 1 key, 2 value."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Consecutive blocks of one kind."""

    name: str
    comfy: str
    blocks: range
    projections: tuple[Projection, ...]


def fused(names: Sequence[str], comfy: str) -> tuple[Projection, ...]:
    """Returns query, key and value, which ComfyUI keeps in one layer."""
    return tuple(Projection(name, comfy, part) for part, name in enumerate(names))


class TransformerSpec:
    """A transformer's targets and places, from its stacks. Subclasses are dataclasses of dimensions."""

    __slots__ = ()

    family: str
    hidden: int
    context_dim: int
    patch: int
    """Side of the square of latent cells that makes one token."""
    image_output: int
    """Index of the image tokens among the outputs of ComfyUI's perception block."""
    last_timestep: float
    """The model's timestep input at pure noise."""
    lora_names: LoraNames

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks in forward order."""
        raise NotImplementedError

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Perception reads the image tokens after its last block."""
        return (self.hidden,)

    @property
    def text_channels(self) -> int:
        """Width of the text tokens before the model's own first layer."""
        return self.context_dim

    def fingerprint(self) -> dict[str, Any]:
        """Returns the dimensions as JSON types."""
        fields: dict[str, Any] = asdict(self)  # pyright: ignore[reportArgumentType]
        return {"family": self.family, **fields}

    def targets(self, mode: PerceptionMode, perception_blocks: int = 4) -> tuple[Target, ...]:
        """Returns the attention projections in forward order; in `prefix` mode the first blocks stay out."""
        first = self.stacks[0].name
        return tuple(
            Target(f"{stack.name}.{block}.{projection.name}", self.hidden, self.hidden)
            for stack in self.stacks
            for block in stack.blocks
            if mode == "separate" or stack.name != first or block >= perception_blocks
            for projection in stack.projections
        )

    def place(self, name: str) -> Place:
        """Returns where ComfyUI keeps a target. Raises KeyError for a name that is none."""
        for stack in self.stacks:
            head, _, rest = name.removeprefix(f"{stack.name}.").partition(".")
            if name.startswith(f"{stack.name}.") and int(head) in stack.blocks:
                known = {projection.name: projection for projection in stack.projections}
                found = known[rest]
                row = None if found.part is None else found.part * self.hidden
                return Place(f"{stack.comfy}.{head}.{found.comfy}", row)
        raise KeyError(name)

    def perception_paths(self, perception_blocks: int) -> tuple[str, str]:
        """Returns diffusers' and ComfyUI's path of the last perception block. Raises HyperAlignError."""
        first = self.stacks[0]
        count = sum(len(stack.blocks) for stack in self.stacks if stack.name == first.name)
        if not 1 <= perception_blocks <= count:
            raise HyperAlignError(
                f"This hypernetwork perceives with the first {perception_blocks} blocks; expected 1 to "
                f"{count} for this {self.family} model. Load one trained for it."
            )
        return f"{first.name}.{perception_blocks - 1}", f"{first.comfy}.{perception_blocks - 1}"
