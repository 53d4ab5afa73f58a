"""Perception: features of the host model's own frozen down path become memory tokens.

No encoder weights are stored; the base model looks at the noisy latent, the time and the prompt,
and its features go through one linear layer per resolution ("Linear -> K, V" in the paper's
framework figure). The prompt's own tokens also reach the decoder directly, as one vector.

Raw features and text vectors are nearly the same for every prompt and time. Both are standardised per channel
by statistics of the base model's rollouts, so that what differs is what the hypernetwork sees.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_IMAGE_TOKENS = 256
PLACE_SCALE = 0.25
"""Length of a cell's place encoding; at full length it would outweigh the standardised features."""


class Perceived(NamedTuple):
    """What the hypernetwork reads of one call of the base model."""

    features: Sequence[Tensor]
    """Unadapted features, one map (B, C, H, W) per level."""
    prompt_BC: Tensor
    """The mean of the prompt's text tokens."""

    @property
    def rows(self) -> int:
        """The number of samples."""
        return len(self.prompt_BC)

    def detached(self) -> Perceived:
        """Returns it without a gradient to the base model."""
        return Perceived([feature.detach() for feature in self.features], self.prompt_BC.detach())


def pool_text(tokens_BLC: Tensor) -> Tensor:
    """Returns the mean of the text tokens (B, C); repeating them all, as ComfyUI does, changes nothing."""
    return tokens_BLC.mean(dim=1, dtype=torch.float32)


def token_map(tokens_BLC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns a transformer's image tokens as a map (B, C, H, W); tokens beyond the grid are dropped.

    What follows the image's own tokens are reference images.
    """
    height, width = grid
    return tokens_BLC[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


def pool_features(features: Sequence[Tensor], limit: int = MAX_IMAGE_TOKENS) -> list[Tensor]:
    """Halves the largest of the maps (B, C, H, W) until all together have at most `limit` cells."""
    shapes = [feature.shape[-2:] for feature in features]
    halvings = [0] * len(shapes)
    while sum(map(math.prod, shapes)) > limit and max(map(math.prod, shapes)) > 1:
        sizes = [math.prod(shape) for shape in shapes]
        largest = sizes.index(max(sizes))
        shapes[largest] = torch.Size(-(-side // 2) for side in shapes[largest])
        halvings[largest] += 1
    return [_halved(feature, times) for feature, times in zip(features, halvings, strict=True)]


def _halved(x_BCHW: Tensor, times: int) -> Tensor:
    """Returns a map halved several times, in one mean where its sides allow that."""
    if times and not any(side % 2**times for side in x_BCHW.shape[-2:]):
        return F.avg_pool2d(x_BCHW, 2**times)
    for _ in range(times):
        x_BCHW = F.avg_pool2d(x_BCHW, 2, ceil_mode=True)
    return x_BCHW


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


class Statistics(nn.Module):
    """Standardises the last dimensions by fixed means and deviations; neutral until they are measured."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (x - mean) / deviation in float32."""
        return (x.float() - self.mean.to(x.device)) / self.deviation.to(x.device)


def unit_linear(channels: int, width: int, operations: ModuleType | Any) -> Any:
    """Returns a linear layer without bias whose outputs have as much variance as its inputs at first."""
    layer = operations.Linear(channels, width, bias=False)
    if layer.weight is not None:  # some hosts create it when they load the file
        nn.init.normal_(layer.weight, std=channels**-0.5)
    return layer


class Perception(nn.Module):
    """What was perceived, as the memory tokens and the modulation vector of the decoder."""

    def __init__(
        self,
        feature_channels: Sequence[int],
        text_channels: int,
        width: int,
        operations: ModuleType | Any = nn,
    ) -> None:
        super().__init__()
        self.width = width
        self.feature_statistics = nn.ModuleList(Statistics(c) for c in feature_channels)
        self.projections = nn.ModuleList(unit_linear(c, width, operations) for c in feature_channels)
        self.text_statistics = Statistics(text_channels)
        self.project_text = unit_linear(text_channels, width, operations)

    def forward(self, perceived: Perceived) -> tuple[Tensor, Tensor]:
        """Returns the memory (B, L, width), L at most 256, and the modulation vector (B, width)."""
        modulation_BC = F.silu(self.project_text(self.text_statistics(perceived.prompt_BC)))
        tokens: list[Tensor] = []
        levels = zip(
            pool_features(perceived.features), self.feature_statistics, self.projections, strict=True
        )
        for feature, standardise, project in levels:
            flat_BLC = feature.flatten(2).transpose(1, 2)
            place_LC = grid_encoding(feature.shape[-2], feature.shape[-1], self.width, feature.device)
            tokens.append(project(standardise(flat_BLC)) + PLACE_SCALE * place_LC)
        return torch.cat(tokens, dim=1), modulation_BC
