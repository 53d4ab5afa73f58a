"""Preprocessing of images for reward networks: checks, clamping, antialiased resizing, normalisation.

It runs in float32 on the device of the images and is differentiable to the pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import HyperAlignError
from ..finite import all_finite
from .networks import encoder_weight

Preprocess = Callable[[Tensor], Tensor]
"""RGB images (B, 3, H, W) in [0, 1] -> the input of a network."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
KEYS_A = -0.5
"""The free parameter of Keys' cubic; Pillow's and PyTorch's antialiased value."""


def check_images(images_BCHW: Tensor) -> None:
    """Raises HyperAlignError unless these are images (B, 1, 3 or 4, H, W) of finite numbers."""
    check_form(images_BCHW)
    if not all_finite(images_BCHW):
        raise HyperAlignError(
            "Found NaN or infinite pixels; expected numbers in [0, 1]. The sampler or the VAE diverged: "
            "lower the CFG scale or decode in float32."
        )


def check_form(images_BCHW: Tensor) -> None:
    """Raises HyperAlignError unless shape and type are those of images; reads no value of them."""
    shape = tuple(images_BCHW.shape)
    if len(shape) != 4 or shape[1] not in (1, 3, 4) or 0 in shape:
        raise HyperAlignError(
            f"Found images of shape {shape}; expected (images, channels, height, width) with 1, 3 or 4 "
            "channels and nothing empty. Move the channels to the second place, or convert to RGB."
        )
    if not images_BCHW.is_floating_point():
        raise HyperAlignError(
            f"Found images of {images_BCHW.dtype}; expected floating point in [0, 1]. Divide by 255."
        )


def network_pixels(images_BCHW: Tensor, network: nn.Module, preprocess: Preprocess) -> Tensor:
    """Returns the input of a network for images, on its device and in its precision."""
    weight = encoder_weight(network)
    images_BCHW = images_BCHW.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return preprocess(clamp_for_descent(rgb(images_BCHW))).to(weight.dtype)


def rgb(images_BCHW: Tensor) -> Tensor:
    """Returns three channels: grey is repeated, transparent pixels are composited on white."""
    match images_BCHW.shape[1]:
        case 1:
            return images_BCHW.expand(-1, 3, -1, -1)
        case 4:
            color_BCHW, alpha_B1HW = clamp_for_descent(images_BCHW).split([3, 1], dim=1)
            return alpha_B1HW * color_BCHW + (1.0 - alpha_B1HW)
        case _:
            return images_BCHW


class _ClampForDescent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,), (gradient,) = ctx.saved_tensors, grad_outputs
        leads_back = gradient * (x - x.clamp(0.0, 1.0)) >= 0.0
        return torch.where(leads_back, gradient, 0.0)


def clamp_for_descent(x: Tensor) -> Tensor:
    """Returns x clamped to [0, 1]; outside, only a gradient whose descent leads back has an effect.

    The derivative of a clamp is 0 outside, where a saturated pixel would never come back; that of the
    identity would push it further out for nothing. So what is differentiated must be a loss, to be minimised:
    of a score, its negative.
    """
    return _ClampForDescent.apply(x)


def crop_to_square(images_BCHW: Tensor, side: int) -> Tensor:
    """Returns images (B, C, side, side): shortest side to `side`, then the centre.

    This is CLIP's preprocessing, with its rounding (torchvision's Resize and CenterCrop).
    """
    height, width = images_BCHW.shape[-2:]
    shortest = min(height, width)
    size = (int(side * height / shortest), int(side * width / shortest))
    corner = (round((size[0] - side) / 2), round((size[1] - side) / 2))
    return clamp_for_descent(resize_window(images_BCHW, size, corner, (side, side)))


def pad_to_square(images_BCHW: Tensor, side: int) -> Tensor:
    """Returns images (B, C, side, side): longest side to `side`, padded with black.

    This is the preprocessing of HPS v2. It resizes floating-point images, so it does not clamp the
    overshoot of the cubic.
    """
    height, width = images_BCHW.shape[-2:]
    scale = side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    resized_BCHW = resize_window(images_BCHW, size, (0, 0), size)
    return F.pad(resized_BCHW, (left, side - size[1] - left, top, side - size[0] - top))


def stretch_to_square(images_BCHW: Tensor, side: int) -> Tensor:
    """Returns images (B, C, side, side), each axis scaled separately: SigLIP's preprocessing."""
    size = (side, side)
    return clamp_for_descent(resize_window(images_BCHW, size, (0, 0), size))


def normalise(images_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Returns (x - mean) / std for each channel."""
    like = (images_BCHW.device, images_BCHW.dtype)
    return (images_BCHW - _of_channels(mean, *like)) / _of_channels(std, *like)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _of_channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns (C, 1, 1), made once: Python waits for each copy to a GPU."""
    return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


def resize_window(
    images_BCHW: Tensor, size: tuple[int, int], corner: tuple[int, int], window: tuple[int, int]
) -> Tensor:
    """Returns a window of the antialiased bicubic resizing of images.

    Each axis is one matrix product. Unlike `F.interpolate`, this computes the window alone (a strip of
    20,000 x 1 pixels costs no more than a photograph), its gradients are deterministic on a GPU, and it is
    correct for images that become 1 pixel wide. The values are Pillow's for floating-point images.

    Args:
        images_BCHW: the images.
        size: height and width of the whole resized image.
        corner: top and left of the window in it.
        window: height and width of the window.
    """
    axes = zip(images_BCHW.shape[-2:], size, corner, window, strict=True)
    rows_hH, columns_wW = (
        kept_bicubic_weights(images_BCHW.device, images_BCHW.dtype, length, resized, first, count)
        for length, resized, first, count in axes
    )
    return rows_hH @ (images_BCHW @ columns_wW.T)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def kept_bicubic_weights(device: torch.device, dtype: torch.dtype, *line: int) -> Tensor:
    """Returns `bicubic_weights` of a line on a device, computed once: Python waits for each copy to a GPU.

    The last two image sizes are kept, because most batches have the size of the one before.
    """
    return bicubic_weights(*line).to(device, dtype)


def bicubic_weights(length: int, resized: int, first: int, count: int) -> Tensor:
    """Returns rows `first` to `first + count` of the matrix (resized, length) that resizes a line of pixels.

    Keys, "Cubic convolution interpolation" (1981); the cubic is widened by the factor of a reduction.
    """
    scale = length / resized
    centres_K = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * scale
    pixels_L = torch.arange(length, dtype=torch.float64) + 0.5
    weights_KL = _keys_cubic((pixels_L - centres_K[:, None]).abs() / max(scale, 1.0))
    return weights_KL / weights_KL.sum(dim=1, keepdim=True)


def _keys_cubic(distance: Tensor) -> Tensor:
    a, d = KEYS_A, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = (((d - 5) * d + 8) * d - 4) * a
    return torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
