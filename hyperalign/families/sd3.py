"""Stable Diffusion 3.5 medium (and 3 medium, 3.5 large): joint blocks, the first with a second attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..targets import LoraNames
from .dit import Projection, Stack, TransformerSpec, fused

DIFFUSERS_CLASS = "SD3Transformer2DModel"
IMAGE = (
    *fused(("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn.qkv"),
    Projection("attn.to_out.0", "x_block.attn.proj"),
)
TEXT = (
    *fused(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "context_block.attn.qkv"),
    Projection("attn.to_add_out", "context_block.attn.proj"),
)
SECOND = (
    *fused(("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.qkv"),
    Projection("attn2.to_out.0", "x_block.attn2.proj"),
)
LAST_TEXT = TEXT[1:3]
"""The last block's text is only looked at: its own query and output lead nowhere."""

LORA_NAMES = LoraNames("transformer.", dot=".", down="lora_A", up="lora_B", has_alpha=False)
"""PEFT's names: diffusers reads no other for this family, and ComfyUI reads them too."""


@dataclass(frozen=True, slots=True)
class SD3Spec(TransformerSpec):
    """The dimensions of an SD3-type transformer."""

    hidden: int = 1536
    blocks: int = 24
    dual_blocks: int = 13
    """The first blocks, which have a second attention among image tokens (3.5 medium)."""
    latent_channels: int = 16
    context_dim: int = 4096

    family = "sd3"
    patch = 2
    image_output = 1
    last_timestep = 1000.0
    lora_names = LORA_NAMES

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Blocks with two attentions, with one, and the last one, whose text ends."""
        last = self.blocks - 1
        ending = (*IMAGE, *LAST_TEXT, *(SECOND if self.dual_blocks > last else ()))
        return tuple(
            Stack("transformer_blocks", "joint_blocks", blocks, projections)
            for blocks, projections in (
                (range(min(self.dual_blocks, last)), (*IMAGE, *TEXT, *SECOND)),
                (range(self.dual_blocks, last), (*IMAGE, *TEXT)),
                (range(last, self.blocks), ending),
            )
        )


SD35_MEDIUM = SD3Spec()


def from_diffusers(config: Mapping[str, Any]) -> SD3Spec:
    """Returns the dimensions in the configuration of an SD3Transformer2DModel."""
    return SD3Spec(
        hidden=config["num_attention_heads"] * config["attention_head_dim"],
        blocks=config["num_layers"],
        dual_blocks=len(config["dual_attention_layers"]),
        latent_channels=config["in_channels"],
        context_dim=config["joint_attention_dim"],
    )


def from_comfy(config: Mapping[str, Any]) -> SD3Spec | None:
    """Returns the dimensions in ComfyUI's `unet_config`, or None if it is no SD3's."""
    if "context_embedder_config" not in config:
        return None
    return SD3Spec(
        hidden=64 * config["depth"],
        blocks=config.get("num_blocks") or config["depth"],
        dual_blocks=len(config.get("x_block_self_attn_layers") or ()),
        latent_channels=config["in_channels"],
        context_dim=config["context_embedder_config"]["params"]["in_features"],
    )
