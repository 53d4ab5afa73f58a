"""Perception: features of the host model's own frozen down path become memory tokens.

No encoder weights are stored; the base model looks at the noisy latent, the time and the prompt,
and its features go through one linear layer per resolution ("Linear -> K, V" in the paper's
framework figure).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_IMAGE_TOKENS = 256


def token_map(tokens_BLC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns a transformer's image tokens as a map (B, C, H, W); tokens beyond the grid are dropped.

    What follows the image's own tokens are reference images.
    """
    height, width = grid
    return tokens_BLC[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


def pool_features(features: Sequence[Tensor], limit: int = MAX_IMAGE_TOKENS) -> list[Tensor]:
    """Halves the largest of the maps (B, C, H, W) until all together have at most `limit` cells."""
    pooled = list(features)
    sizes = [feature.shape[-2] * feature.shape[-1] for feature in pooled]
    while sum(sizes) > limit and max(sizes) > 1:
        largest = sizes.index(max(sizes))
        pooled[largest] = F.avg_pool2d(pooled[largest], 2, ceil_mode=True)
        sizes[largest] = pooled[largest].shape[-2] * pooled[largest].shape[-1]
    return pooled


def sinusoidal_encoding(positions_N: Tensor, width: int) -> Tensor:
    """Returns (N, width) sines and cosines at geometric frequencies (Vaswani et al. 2017, 3.5)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=positions_N.device) * (-9.21034 / max(1, half - 1)))
    angles = positions_N.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def index_encoding(count: int, width: int, device: torch.device) -> Tensor:
    """Returns (count, width): the encoding of 0, 1, ..., kept for the next call."""
    return _kept(_index_encoding, count, width, device)


def grid_encoding(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Returns (height * width, channels), kept for the next call: half tell the row, half the column.

    Positions are relative to the map's size (0 to 64), so that a cell means the same part of the
    image at every resolution.
    """
    return _kept(_grid_encoding, height, width, channels, device)


def _index_encoding(count: int, width: int, device: torch.device) -> Tensor:
    return sinusoidal_encoding(torch.arange(count, device=device), width)


def _grid_encoding(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    rows = (torch.arange(height, device=device) + 0.5) * (64.0 / height)
    columns = (torch.arange(width, device=device) + 0.5) * (64.0 / width)
    by_row = sinusoidal_encoding(rows, channels // 2).repeat_interleave(width, dim=0)
    by_column = sinusoidal_encoding(columns, channels // 2).repeat(height, 1)
    return torch.cat([by_row, by_column], dim=-1)


def _kept(make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    # A compiled graph makes it anew, fused with what reads it; torch.compile looks past caches anyway.
    return make(*arguments) if torch.compiler.is_compiling() else _cached(make, *arguments)


@functools.lru_cache(maxsize=80)
@torch.inference_mode(False)  # what an inference makes, training may not use
def _cached(make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return make(*arguments)


class Perception(nn.Module):
    """Features of each resolution level to one sequence of memory tokens."""

    def __init__(self, channels: Sequence[int], width: int, operations: ModuleType | Any = nn) -> None:
        super().__init__()
        self.width = width
        self.norms = nn.ModuleList(operations.LayerNorm(c) for c in channels)
        self.projections = nn.ModuleList(operations.Linear(c, width) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Returns memory (B, L, width) for one (B, C, H, W) map per level; L is at most 256."""
        tokens: list[Tensor] = []
        for feature, norm, project in zip(pool_features(features), self.norms, self.projections, strict=True):
            flat_BLC = feature.flatten(2).transpose(1, 2).float()
            place_LC = grid_encoding(feature.shape[-2], feature.shape[-1], self.width, feature.device)
            tokens.append(project(norm(flat_BLC)) + place_LC)
        return torch.cat(tokens, dim=1)
