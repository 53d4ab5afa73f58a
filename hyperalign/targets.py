"""What is adapted: the attention projections of a base model, by name and shape.

Names are diffusers' module paths; `comfy_name` says what ComfyUI calls the same module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

PerceptionMode = Literal["separate", "prefix"]


@dataclass(frozen=True, slots=True)
class Target:
    """One adapted linear layer."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The dimensions of a U-Net that decide whether a hypernetwork fits it."""

    family: str
    in_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    cross_attention_dim: int
    transformer_layers: tuple[int, ...]
    """Transformer layers per attention block of each level; 0 where a level has no attention."""

    def fingerprint(self) -> dict[str, Any]:
        """Returns the dimensions as JSON types, as the checkpoint header stores them."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


TINY = BaseSpec(
    family="tiny",
    in_channels=4,
    block_out_channels=(64, 128, 128),
    layers_per_block=1,
    cross_attention_dim=128,
    transformer_layers=(1, 1, 1),
)


def attention_targets(spec: BaseSpec, mode: PerceptionMode) -> tuple[Target, ...]:
    """Returns to_q, to_k, to_v and to_out.0 of every attention, in forward order.

    In `prefix` mode the down blocks are the perception encoder of the same forward pass and stay
    unadapted: only the middle and up blocks are listed.
    """
    blocks = list(_attention_blocks(spec))
    if mode == "prefix":
        blocks = [block for block in blocks if not block[0].startswith("down_blocks")]
    return tuple(
        target
        for name, channels, depth in blocks
        for layer in range(depth)
        for target in _layer_targets(f"{name}.transformer_blocks.{layer}", channels, spec.cross_attention_dim)
    )


def _attention_blocks(spec: BaseSpec) -> Iterator[tuple[str, int, int]]:
    levels = list(zip(spec.block_out_channels, spec.transformer_layers, strict=True))
    for level, (channels, depth) in enumerate(levels):
        for i in range(spec.layers_per_block if depth else 0):
            yield f"down_blocks.{level}.attentions.{i}", channels, depth
    yield "mid_block.attentions.0", levels[-1][0], levels[-1][1] or 1
    for level, (channels, depth) in enumerate(reversed(levels)):
        for i in range(spec.layers_per_block + 1 if depth else 0):
            yield f"up_blocks.{level}.attentions.{i}", channels, depth


def _layer_targets(prefix: str, channels: int, context: int) -> Iterator[Target]:
    for attention, source in (("attn1", channels), ("attn2", context)):
        yield Target(f"{prefix}.{attention}.to_q", channels, channels)
        yield Target(f"{prefix}.{attention}.to_k", source, channels)
        yield Target(f"{prefix}.{attention}.to_v", source, channels)
        yield Target(f"{prefix}.{attention}.to_out.0", channels, channels)


def comfy_name(name: str, layers_per_block: int) -> str:
    """Returns ComfyUI's path of a diffusers U-Net attention module."""
    n = layers_per_block
    if match := re.match(r"down_blocks\.(\d+)\.attentions\.(\d+)\.", name):
        level, index = int(match[1]), int(match[2])
        return f"input_blocks.{1 + (n + 1) * level + index}.1.{name[match.end() :]}"
    if match := re.match(r"up_blocks\.(\d+)\.attentions\.(\d+)\.", name):
        level, index = int(match[1]), int(match[2])
        return f"output_blocks.{(n + 1) * level + index}.1.{name[match.end() :]}"
    return re.sub(r"^mid_block\.attentions\.0\.", "middle_block.1.", name)


def perception_input_blocks(spec: BaseSpec) -> tuple[int, ...]:
    """Returns ComfyUI's input_blocks whose outputs are the last features of each resolution."""
    per_level = spec.layers_per_block + 1
    return tuple(per_level * (level + 1) - 1 for level in range(len(spec.block_out_channels)))
