"""Image augmentation for the evaluators: mild for robustness, strong for the rejected image of a pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _uniform(batch: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(batch, 1, 1, 1, generator=generator)


def coarse(images_BCHW: Tensor, factor: int) -> Tensor:
    """Returns the images averaged over `factor` pixels and interpolated back."""
    small = F.avg_pool2d(images_BCHW, factor)
    return F.interpolate(small, size=images_BCHW.shape[-2:], mode="bilinear", align_corners=False)


def warp(images_BCHW: Tensor, pixels_B111: Tensor, generator: torch.Generator) -> Tensor:
    """Bends the images smoothly by about `pixels_B111`, like badly drawn shapes."""
    batch, _, height, width = images_BCHW.shape
    bends = torch.randn(batch, 2, 8, 8, generator=generator) * pixels_B111 * (2.0 / width)
    shift = F.interpolate(bends, size=(height, width), mode="bicubic", align_corners=False).permute(
        0, 2, 3, 1
    )
    straight = F.affine_grid(
        torch.eye(2, 3).expand(batch, 2, 3), [batch, 3, height, width], align_corners=False
    )
    return F.grid_sample(images_BCHW, straight + shift, padding_mode="border", align_corners=False)


def jitter(images_BCHW: Tensor, generator: torch.Generator, bend: float = 0.0) -> Tensor:
    """Changes blur, brightness, contrast and noise of each image slightly; warps up to `bend` pixels."""
    batch = len(images_BCHW)
    x = images_BCHW
    if bend:
        x = warp(x, _uniform(batch, 0.0, bend, generator), generator)
    blur = (_uniform(batch, -0.6, 0.9, generator)).clamp(min=0.0)
    x = torch.lerp(x, coarse(x, 2), blur)
    x = (x - 0.5) * _uniform(batch, 0.88, 1.1, generator) + 0.5 + _uniform(batch, -0.05, 0.05, generator)
    x = x + torch.randn(x.shape, generator=generator) * _uniform(batch, 0.0, 0.04, generator)
    return x.clamp(0.0, 1.0)


def degrade(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Blurs, adds noise to, bends or ghosts each image: clearly worse but still recognisable."""
    batch = len(images_BCHW)
    blurred = torch.lerp(coarse(images_BCHW, 2), coarse(images_BCHW, 4), _uniform(batch, 0.2, 0.8, generator))
    strength = _uniform(batch, 0.08, 0.2, generator)
    noisy = images_BCHW + coarse(torch.randn(images_BCHW.shape, generator=generator), 2) * 2.0 * strength
    bent = warp(images_BCHW, _uniform(batch, 1.5, 3.5, generator), generator)
    ghosted = torch.lerp(images_BCHW, images_BCHW.roll(1, dims=0), _uniform(batch, 0.15, 0.35, generator))
    kind = torch.randint(0, 4, (1, batch, 1, 1, 1), generator=generator)
    stacked = torch.stack([blurred, noisy, bent, ghosted])
    return stacked.gather(0, kind.expand(1, *images_BCHW.shape))[0].clamp(0.0, 1.0)
