"""The base models' architectures with random weights: for smoke runs and benchmarks, without downloads."""

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
class Shape:
    """How much of a true architecture is built."""

    double_blocks: int = 0
    """FLUX.1's double blocks, or SD 3.5's joint blocks."""
    single_blocks: int = 0
    narrow: int = 1
    """Divides the width of every layer."""


TRUE_SHAPES: dict[BaseName, Shape] = {
    "sd15": Shape(),
    "sdxl": Shape(),
    "flux": Shape(double_blocks=19, single_blocks=38),
    "sd3": Shape(double_blocks=24),
}
NARROW = (1, 2, 10)
"""A U-Net's 320 channels can be divided by these: its norms want multiples of 32."""
FEWEST_BLOCKS = 5
"""The four that perceive, and one that is adapted."""


def architecture(base: BaseName, shape: Shape) -> nn.Module:
    """Returns the backbone. Raises HyperAlignError if a width cannot be divided so."""
    make = {"sd15": _sd15, "sdxl": _sdxl, "flux": _flux, "sd3": _sd3}[base]
    return make(shape)


def autoencoder(base: BaseName) -> nn.Module:
    """Returns the autoencoder: 8 times smaller latents of 4 or 16 channels."""
    scale, shift, channels = {
        "sd15": (0.18215, None, 4),
        "sdxl": (0.13025, None, 4),
        "flux": (0.3611, 0.1159, 16),
        "sd3": (1.5305, 0.0609, 16),
    }[base]
    return AutoencoderKL(
        down_block_types=cast("tuple[str]", ("DownEncoderBlock2D",) * 4),
        up_block_types=cast("tuple[str]", ("UpDecoderBlock2D",) * 4),
        block_out_channels=cast("tuple[int]", (128, 256, 512, 512)),
        layers_per_block=2, latent_channels=channels, scaling_factor=scale, shift_factor=shift,
    )  # fmt: skip


def parameters_of(base: BaseName, shape: Shape) -> int:
    """Returns the number of a backbone's parameters, without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in architecture(base, shape).parameters())


def smaller(base: BaseName) -> Iterator[Shape]:
    """Yields the true shape and then ever smaller ones."""
    shape = TRUE_SHAPES[base]
    yield shape
    if base in ("sd15", "sdxl"):
        yield from (Shape(narrow=narrow) for narrow in NARROW[1:])
        return
    while shape.double_blocks > FEWEST_BLOCKS or shape.single_blocks > 1:
        double = max(FEWEST_BLOCKS, shape.double_blocks // 2)
        shape = dataclasses.replace(shape, double_blocks=double, single_blocks=shape.single_blocks // 2)
        yield shape
    for narrow in (4, 12):
        yield dataclasses.replace(shape, narrow=narrow)


def largest_within(base: BaseName, parameters: int) -> Shape:
    """Returns the largest shape with at most so many parameters; the smallest there is, if none."""
    shape = TRUE_SHAPES[base]
    for shape in smaller(base):
        if parameters_of(base, shape) <= parameters:
            return shape
    return shape


@torch.no_grad()
def with_random_weights(
    model: nn.Module, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> nn.Module:
    """Returns a model made on the meta device with weights that keep the scale of activations."""
    nn.Module.to(model, dtype)  # diffusers' own would warn of layers it has none of
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


def _divided(number: int, narrow: int, unit: int = 1) -> int:
    """Returns a narrower width, a multiple of `unit`."""
    if narrow < 1 or number % (narrow * unit):
        raise HyperAlignError(
            f"narrow is {narrow}; expected a divisor of {number // unit} for this model. "
            "Use 1, 2, 5 or 10 for U-Nets and 1, 2, 3, 4, 6 or 12 for transformers."
        )
    return number // narrow


def _sd15(shape: Shape) -> nn.Module:
    channels = tuple(_divided(c, shape.narrow, 32) for c in (320, 640, 1280, 1280))
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=channels
    )


def _sdxl(shape: Shape) -> nn.Module:
    channels = tuple(_divided(c, shape.narrow, 32) for c in (320, 640, 1280))
    heads: Any = tuple(max(1, c // 64) for c in channels)  # diffusers' name for it is the head's width
    layers: Any = (1, 2, 10)  # declared shorter than it is
    return UNet2DConditionModel(
        sample_size=128, block_out_channels=channels, layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=layers, attention_head_dim=heads, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def _flux(shape: Shape) -> nn.Module:
    return FluxTransformer2DModel(
        num_layers=shape.double_blocks, num_single_layers=shape.single_blocks, guidance_embeds=True,
        num_attention_heads=_divided(24, shape.narrow),
    )  # fmt: skip


def _sd3(shape: Shape) -> nn.Module:
    heads = _divided(24, shape.narrow)
    dual = cast("tuple[()]", tuple(range(min(13, shape.double_blocks - 1))))  # so diffusers declares it
    return SD3Transformer2DModel(
        num_layers=shape.double_blocks, num_attention_heads=heads, caption_projection_dim=64 * heads,
        in_channels=16, pos_embed_max_size=384, dual_attention_layers=dual, qk_norm="rms_norm",
        joint_attention_dim=4096, pooled_projection_dim=2048,
    )  # fmt: skip
