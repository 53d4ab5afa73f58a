"""Properties of pixels, and alterations of images that keep their content."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""


def luma(image_CHW: Tensor) -> Tensor:
    """Returns the brightness (H, W) of an image in [0, 1]."""
    red, green, blue = image_CHW
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def properties(image_CHW: Tensor) -> dict[str, float]:
    """Returns the properties of an image (3, H, W) in [0, 1]."""
    grey_HW, high_HW, low_HW = luma(image_CHW), image_CHW.amax(0), image_CHW.amin(0)
    height, width = grey_HW.shape
    edges = (grey_HW[1:, :-1] - grey_HW[:-1, :-1]).abs() + (grey_HW[:-1, 1:] - grey_HW[:-1, :-1]).abs()
    return {
        "brightness": float(grey_HW.mean()),
        "contrast": float(grey_HW.std()) if grey_HW.numel() > 1 else 0.0,
        "saturation": float(((high_HW - low_HW) / high_HW.clamp(min=1e-6)).mean()),
        "sharpness": float(edges.mean()) if edges.numel() else 0.0,
        "warmth (red - blue)": float((image_CHW[0] - image_CHW[2]).mean()),
        "megapixels": height * width / 1e6,
        "width / height": width / height,
    }


def saturated(image_CHW: Tensor, factor: float) -> Tensor:
    """Returns the image with its colours `factor` times as far from grey."""
    grey_1HW = luma(image_CHW)[None]
    return (grey_1HW + factor * (image_CHW - grey_1HW)).clamp(0.0, 1.0)


def blurred(image_CHW: Tensor) -> Tensor:
    """Returns the image with each pixel the mean of its 3 x 3 neighbours."""
    padded = F.pad(image_CHW[None], (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(padded, 3, stride=1)[0]


ALTERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mirrored": lambda image_CHW: image_CHW.flip(-1),
    "brighter by 20 %": lambda image_CHW: (1.2 * image_CHW).clamp(max=1.0),
    "darker by 20 %": lambda image_CHW: 0.8 * image_CHW,
    "colours 40 % stronger": lambda image_CHW: saturated(image_CHW, 1.4),
    "without colour": lambda image_CHW: saturated(image_CHW, 0.0),
    "blurred": blurred,
}
"""Functions from images (3, H, W) in [0, 1] to such images; they keep the content.

"mirrored" shows how much the score changes without any reason.
"""
