"""The hypernetwork h of Eq 7: features of (x_t, t, c) in, one small core per adapted module out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .delta import core_matrix
from .errors import HyperAlignError
from .perception import Perception, index_encoding
from .targets import Target

Conditioning = Literal["full", "none"]
MAX_SIZE = 8192


@dataclass(frozen=True, slots=True)
class HyperNetworkConfig:
    """The hypernetwork's sizes; the letters are those of `factors`."""

    rank: int = 4
    a: int = 16
    b: int = 16
    width: int = 128
    layers: int = 3
    heads: int = 4
    conditioning: Conditioning = "full"
    """`none` holds one learned core for all rows: a static LoRA of the same shape."""

    def __post_init__(self) -> None:
        """Checks the sizes. Raises HyperAlignError."""
        for name in ("rank", "a", "b", "width", "layers", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                raise HyperAlignError(f"{name} is {value!r}; expected a whole number from 1 to {MAX_SIZE}.")
        if self.width % (4 * self.heads):
            raise HyperAlignError(
                f"width is {self.width} and heads is {self.heads}; width must be a multiple of 4 * heads."
            )
        if self.conditioning not in ("full", "none"):
            raise HyperAlignError(f"conditioning is {self.conditioning!r}; expected 'full' or 'none'.")


class Attention(nn.Module):
    """Multi-head attention from queries to a memory."""

    def __init__(self, width: int, heads: int, operations: ModuleType | Any) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = operations.Linear(width, width)
        self.to_k = operations.Linear(width, width)
        self.to_v = operations.Linear(width, width)
        self.to_out = operations.Linear(width, width)

    def forward(self, x_BMC: Tensor, memory_BLC: Tensor) -> Tensor:
        """Returns (B, M, C)."""

        def split(y_BNC: Tensor) -> Tensor:
            return y_BNC.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.to_q(x_BMC)), split(self.to_k(memory_BLC)), split(self.to_v(memory_BLC))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Pre-norm self-attention among module tokens, cross-attention to memory, feed-forward."""

    def __init__(self, width: int, heads: int, operations: ModuleType | Any) -> None:
        super().__init__()
        self.norm_self = operations.LayerNorm(width)
        self.attend_self = Attention(width, heads, operations)
        self.norm_memory = operations.LayerNorm(width)
        self.attend_memory = Attention(width, heads, operations)
        self.norm_feed = operations.LayerNorm(width)
        self.feed_in = operations.Linear(width, 4 * width)
        self.feed_out = operations.Linear(4 * width, width)

    def forward(self, x_BMC: Tensor, memory_BLC: Tensor) -> Tensor:
        """Returns (B, M, C)."""
        normed = self.norm_self(x_BMC)
        x_BMC = x_BMC + self.attend_self(normed, normed)
        x_BMC = x_BMC + self.attend_memory(self.norm_memory(x_BMC), memory_BLC)
        return x_BMC + self.feed_out(F.gelu(self.feed_in(self.norm_feed(x_BMC))))


class HyperNetwork(nn.Module):
    """Perception, one query token per adapted module, decoder, one shared linear head.

    Only B_aux starts at zero: the adapted model begins as the base model, B_aux receives a gradient
    at the first step and everything else by the second.
    """

    def __init__(
        self,
        config: HyperNetworkConfig,
        targets: Sequence[Target],
        feature_channels: Sequence[int],
        operations: ModuleType | Any = nn,
    ) -> None:
        super().__init__()
        self.config = config
        self.targets = tuple(targets)
        self.feature_channels = tuple(feature_channels)
        self.a_aux = nn.ParameterList(_scaled_normal(config.a, t.in_features) for t in self.targets)
        self.b_aux = nn.ParameterList(torch.zeros(t.out_features, config.b) for t in self.targets)
        count, numbers = len(self.targets), config.rank * (config.a + config.b)
        if config.conditioning == "none":
            self.static_factors = nn.Parameter(torch.randn(count, numbers) * config.rank**-0.25)
            return
        self.perception = Perception(self.feature_channels, config.width, operations)
        self.queries = nn.Parameter(torch.zeros(count, config.width))
        self.decoder = nn.ModuleList(
            DecoderLayer(config.width, config.heads, operations) for _ in range(config.layers)
        )
        self.head_norm = operations.LayerNorm(config.width)
        self.head = operations.Linear(config.width, numbers)

    @property
    def is_static(self) -> bool:
        """Whether the same core serves every row."""
        return self.config.conditioning == "none"

    def aux(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns A_aux (a, d_in) and B_aux (d_out, b) of one target."""
        return self.a_aux[index], self.b_aux[index]

    def factors(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns B_hyper (B, M, b, r) and A_hyper (B, M, r, a), in float32.

        `features` is one map (B, C, H, W) per level of `feature_channels`.
        """
        rows = features[0].shape[0]
        if self.is_static:
            numbers_BMF = self.static_factors.float().expand(rows, -1, -1)
        else:
            numbers_BMF = self._decode(features).float() * self.config.rank**-0.25
        rank, a, b = self.config.rank, self.config.a, self.config.b
        b_numbers, a_numbers = numbers_BMF.split([rank * b, rank * a], dim=-1)
        return b_numbers.unflatten(-1, (b, rank)), a_numbers.unflatten(-1, (rank, a))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Returns the cores K (B, M, b, a), in float32 and in the order of `targets`."""
        return core_matrix(*self.factors(features))

    def _decode(self, features: Sequence[Tensor]) -> Tensor:
        memory_BLC = self.perception(features)
        places_MC = index_encoding(len(self.targets), self.config.width, memory_BLC.device)
        tokens_MC = self.queries.to(memory_BLC) + places_MC
        x_BMC = tokens_MC.expand(memory_BLC.shape[0], -1, -1)
        for layer in self.decoder:
            x_BMC = layer(x_BMC, memory_BLC)
        return self.head(self.head_norm(x_BMC))


def _scaled_normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * columns**-0.5
