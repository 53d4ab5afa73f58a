"""Architectures of the base models with random weights: for smoke runs and benchmarks without downloads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from hyperalign.errors import HyperAlignError
from train.config import BaseName


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The depth and width of an architecture."""

    double_blocks: int = 0
    """FLUX.1's double blocks, or SD 3.5's joint blocks."""
    single_blocks: int = 0
    width_divisor: int = 1
    """Divides the width of every layer."""


FULL_SIZES: dict[BaseName, ModelSize] = {
    "sd15": ModelSize(),
    "sdxl": ModelSize(),
    "flux": ModelSize(double_blocks=19, single_blocks=38),
    "sd3": ModelSize(double_blocks=24),
}
UNET_DIVISORS = (2, 10)
"""Divisors of a U-Net's 320 channels whose quotients are multiples of 32, as its norms require."""
AUTOENCODER_DIVISOR = 4
"""The largest divisor of an autoencoder's 128 channels that leaves its norms their 32 groups."""
MIN_BLOCKS = 5
"""The four perception blocks and one adapted block."""


def architecture(base: BaseName, size: ModelSize) -> nn.Module:
    """Returns the backbone. Raises HyperAlignError if a width cannot be divided like this."""
    make = {"sd15": _sd15, "sdxl": _sdxl, "flux": _flux, "sd3": _sd3}[base]
    return make(size)


def autoencoder(base: BaseName, size: ModelSize | None = None) -> nn.Module:
    """Returns the autoencoder: 8 times smaller latents of 4 or 16 channels. None is its true size."""
    divisor = 1 if size is None or size.width_divisor == 1 else AUTOENCODER_DIVISOR
    scale, shift, channels = {
        "sd15": (0.18215, None, 4),
        "sdxl": (0.13025, None, 4),
        "flux": (0.3611, 0.1159, 16),
        "sd3": (1.5305, 0.0609, 16),
    }[base]
    return AutoencoderKL(
        down_block_types=cast("tuple[str]", ("DownEncoderBlock2D",) * 4),
        up_block_types=cast("tuple[str]", ("UpDecoderBlock2D",) * 4),
        block_out_channels=cast("tuple[int]", tuple(c // divisor for c in (128, 256, 512, 512))),
        layers_per_block=2, latent_channels=channels, scaling_factor=scale, shift_factor=shift,
    )  # fmt: skip


def parameter_count(base: BaseName, size: ModelSize) -> int:
    """Returns the number of parameters of a backbone without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in architecture(base, size).parameters())


def descending_sizes(base: BaseName) -> Iterator[ModelSize]:
    """Yields the full size and then smaller and smaller ones."""
    size = FULL_SIZES[base]
    yield size
    if base in ("sd15", "sdxl"):
        yield from (ModelSize(width_divisor=divisor) for divisor in UNET_DIVISORS)
        return
    while size.double_blocks > MIN_BLOCKS or size.single_blocks > 1:
        double = max(MIN_BLOCKS, size.double_blocks // 2)
        size = dataclasses.replace(size, double_blocks=double, single_blocks=size.single_blocks // 2)
        yield size
    for divisor in (4, 12):
        yield dataclasses.replace(size, width_divisor=divisor)


def largest_within(base: BaseName, parameters: int) -> ModelSize:
    """Returns the largest size with at most this many parameters, or the smallest size."""
    size = FULL_SIZES[base]
    for size in descending_sizes(base):
        if parameter_count(base, size) <= parameters:
            return size
    return size


@torch.no_grad()
def with_random_weights(
    model: nn.Module, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> nn.Module:
    """Fills a model from the meta device with weights that keep the scale of activations."""
    nn.Module.to(model, dtype)  # diffusers' own `to` would warn about layers that it does not have
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        _fill(key, value, generator)
    return model


def _fill(key: str, value: Tensor, generator: torch.Generator) -> None:
    if value.dim() > 1:
        value.normal_(std=value[0].numel() ** -0.5, generator=generator)
    else:
        value.fill_(float(key.endswith("weight")))


def _divided(width: int, divisor: int, unit: int = 1) -> int:
    """Returns a smaller width, a multiple of `unit`."""
    if divisor < 1 or width % (divisor * unit):
        raise HyperAlignError(
            f"The width divisor is {divisor}; expected a divisor of {width // unit} for this model. "
            "Use 1, 2, 5 or 10 for U-Nets and 1, 2, 3, 4, 6 or 12 for transformers."
        )
    return width // divisor


def _sd15(size: ModelSize) -> nn.Module:
    channels = tuple(_divided(c, size.width_divisor, 32) for c in (320, 640, 1280, 1280))
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=channels
    )


def _sdxl(size: ModelSize) -> nn.Module:
    channels = tuple(_divided(c, size.width_divisor, 32) for c in (320, 640, 1280))
    heads: Any = tuple(max(1, c // 64) for c in channels)  # diffusers names the width of a head so
    # The smallest size is shallower too. diffusers declares a shorter tuple.
    layers: Any = (1, 2, 10) if size.width_divisor < UNET_DIVISORS[-1] else (1, 1, 2)
    return UNet2DConditionModel(
        sample_size=128, block_out_channels=channels, layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=layers, attention_head_dim=heads, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def _flux(size: ModelSize) -> nn.Module:
    return FluxTransformer2DModel(
        num_layers=size.double_blocks, num_single_layers=size.single_blocks, guidance_embeds=True,
        num_attention_heads=_divided(24, size.width_divisor),
    )  # fmt: skip


def _sd3(size: ModelSize) -> nn.Module:
    heads = _divided(24, size.width_divisor)
    # diffusers declares an empty tuple
    dual = cast("tuple[()]", tuple(range(min(13, size.double_blocks - 1))))
    return SD3Transformer2DModel(
        num_layers=size.double_blocks, num_attention_heads=heads, caption_projection_dim=64 * heads,
        in_channels=16, pos_embed_max_size=384, dual_attention_layers=dual, qk_norm="rms_norm",
        joint_attention_dim=4096, pooled_projection_dim=2048,
    )  # fmt: skip
