"""Stable-Diffusion-type U-Nets: SD 1.5, SDXL and the embedded tiny model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..targets import LoraNames, PerceptionMode, Place, Target

DIFFUSERS_CLASS = "UNet2DConditionModel"
LAST_TIMESTEP = 999.0
FAMILY_OF_CONTEXT = {128: "tiny", 768: "sd15", 2048: "sdxl"}
"""Families by the width of the text encoder's vectors."""
LORA_NAMES = LoraNames("lora_unet_")
"""Both hosts read them with diffusers' paths, for SDXL too."""


@dataclass(frozen=True, slots=True)
class UNetSpec:
    """The dimensions of a U-Net."""

    family: str
    in_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    cross_attention_dim: int
    transformer_layers: tuple[int, ...]
    """Transformer layers per attention block of each level; 0 where a level has no attention."""

    @property
    def lora_names(self) -> LoraNames:
        """Those of kohya's trainer."""
        return LORA_NAMES

    @property
    def last_timestep(self) -> float:
        """Time is one of 1,000 timesteps."""
        return LAST_TIMESTEP

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Perception reads each resolution's last feature of the down path."""
        return self.block_out_channels

    @property
    def text_channels(self) -> int:
        """Cross-attention reads the text tokens."""
        return self.cross_attention_dim

    @property
    def perception_input_blocks(self) -> tuple[int, ...]:
        """ComfyUI's input_blocks whose outputs are those features."""
        per_level = self.layers_per_block + 1
        return tuple(per_level * (level + 1) - 1 for level in range(len(self.block_out_channels)))

    def fingerprint(self) -> dict[str, Any]:
        """Returns the dimensions as JSON types."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    def targets(self, mode: PerceptionMode, perception_blocks: int = 0) -> tuple[Target, ...]:
        """Returns to_q, to_k, to_v and to_out.0 of every attention, in forward order.

        The perception encoder is the whole down path, so `perception_blocks` has no meaning here: in
        `prefix` mode only the middle and up blocks are listed.
        """
        del perception_blocks
        blocks = list(self._attention_blocks())
        if mode == "prefix":
            blocks = [block for block in blocks if not block[0].startswith("down_blocks")]
        return tuple(
            target
            for name, channels, depth in blocks
            for layer in range(depth)
            for target in self._layer_targets(f"{name}.transformer_blocks.{layer}", channels)
        )

    def place(self, name: str) -> Place:
        """Returns where ComfyUI keeps a target; nothing is fused in its U-Nets."""
        per_level = self.layers_per_block + 1
        if match := re.match(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", name):
            number = per_level * int(match[2]) + int(match[3])
            side = f"input_blocks.{1 + number}" if match[1] == "down" else f"output_blocks.{number}"
            return Place(f"{side}.1.{name[match.end() :]}")
        return Place(re.sub(r"^mid_block\.attentions\.0\.", "middle_block.1.", name))

    def _attention_blocks(self) -> Iterator[tuple[str, int, int]]:
        levels = list(zip(self.block_out_channels, self.transformer_layers, strict=True))
        for level, (channels, depth) in enumerate(levels):
            for i in range(self.layers_per_block if depth else 0):
                yield f"down_blocks.{level}.attentions.{i}", channels, depth
        yield "mid_block.attentions.0", levels[-1][0], levels[-1][1] or 1
        for level, (channels, depth) in enumerate(reversed(levels)):
            for i in range(self.layers_per_block + 1 if depth else 0):
                yield f"up_blocks.{level}.attentions.{i}", channels, depth

    def _layer_targets(self, prefix: str, channels: int) -> Iterator[Target]:
        for attention, source in (("attn1", channels), ("attn2", self.cross_attention_dim)):
            yield Target(f"{prefix}.{attention}.to_q", channels, channels)
            yield Target(f"{prefix}.{attention}.to_k", source, channels)
            yield Target(f"{prefix}.{attention}.to_v", source, channels)
            yield Target(f"{prefix}.{attention}.to_out.0", channels, channels)


TINY = UNetSpec("tiny", 4, (64, 128, 128), 1, 128, (1, 1, 1))
SD15 = UNetSpec("sd15", 4, (320, 640, 1280, 1280), 2, 768, (1, 1, 1, 0))
SDXL = UNetSpec("sdxl", 4, (320, 640, 1280), 2, 2048, (0, 2, 10))


def from_diffusers(config: Mapping[str, Any]) -> UNetSpec:
    """Returns the dimensions in the configuration of a UNet2DConditionModel."""
    channels = tuple(config["block_out_channels"])
    depth = config.get("transformer_layers_per_block", 1)
    depths = tuple(depth) if isinstance(depth, (list, tuple)) else (depth,) * len(channels)
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    context = config["cross_attention_dim"]
    return UNetSpec(
        family=FAMILY_OF_CONTEXT.get(context, "unknown"),
        in_channels=config["in_channels"],
        block_out_channels=channels,
        layers_per_block=config["layers_per_block"],
        cross_attention_dim=context,
        transformer_layers=tuple(d if a else 0 for d, a in zip(depths, attends, strict=True)),
    )


def from_comfy(config: Mapping[str, Any]) -> UNetSpec | None:
    """Returns the dimensions in ComfyUI's `unet_config`, or None if it is no U-Net's."""
    if "num_res_blocks" not in config or "channel_mult" not in config:
        return None
    per_level: list[int] = list(config["num_res_blocks"])
    depths: list[int] = list(config["transformer_depth"])
    starts = [sum(per_level[:level]) for level in range(len(per_level))]
    context = int(config.get("context_dim") or 0)
    return UNetSpec(
        family=FAMILY_OF_CONTEXT.get(context, "unknown"),
        in_channels=int(config["in_channels"]),
        block_out_channels=tuple(int(config["model_channels"]) * mult for mult in config["channel_mult"]),
        layers_per_block=per_level[0],
        cross_attention_dim=context,
        transformer_layers=tuple(depths[start] for start in starts),
    )
