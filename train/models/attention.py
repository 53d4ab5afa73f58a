"""Attention in float32 inside bfloat16 autocast, for training on a CPU.

PyTorch 2.13's fused attention runs backward in bfloat16 on short sequences about five times slower
than in float32 on a CPU; the projections around it stay in bfloat16.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttentionProcessor
from torch import Tensor
from torch.nn import functional as F


class Float32Attention:
    """A diffusers attention processor for plain self- and cross-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns (B, N, C); masks are not supported, the tiny model has none."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def split(y_BNC: Tensor) -> Tensor:
            return y_BNC.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float()

        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(source)), split(attn.to_v(source))
        with torch.autocast(hidden_states.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(q, k, v)
        merged = mixed.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](merged))


def use_float32_attention(unet: UNet2DConditionModel) -> None:
    """Installs `Float32Attention` in every attention of the U-Net."""
    unet.set_attn_processor(cast(AttentionProcessor, Float32Attention()))
