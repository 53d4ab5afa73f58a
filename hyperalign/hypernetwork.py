"""The hypernetwork h of Eq 7: features of (x_t, t, c) in, one small core per adapted module out.

The core's factors are a static part, the same for every sample, and a conditional part, which the decoder
generates. Both have the same energy when training begins, so that neither has to be woken by the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .delta import core_matrix
from .errors import HyperAlignError, shown
from .perception import Perceived, Perception, Statistics, index_encoding, unit_linear
from .targets import Target

Conditioning = Literal["full", "constant", "none"]
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
    """What the weights depend on. `none` holds the static part alone: a static LoRA of the same shape.
    `constant` has the same decoder, which perceives nothing: as many trained numbers without conditioning."""

    def __post_init__(self) -> None:
        """Checks the sizes. Raises HyperAlignError."""
        for name in ("rank", "a", "b", "width", "layers", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                raise HyperAlignError(
                    f"{name} is {shown(value)}; expected a whole number from 1 to {MAX_SIZE}."
                )
        if self.width % (4 * self.heads):
            raise HyperAlignError(
                f"width is {self.width} and heads is {self.heads}; width must be a multiple of 4 * heads."
            )
        if self.conditioning not in get_args(Conditioning):
            raise HyperAlignError(
                f"conditioning is {shown(self.conditioning)}; expected 'full', 'constant' or 'none'."
            )


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
    """Pre-norm self-attention among module tokens, cross-attention to memory, feed-forward.

    The prompt scales and shifts the input of each (AdaLN, Peebles and Xie 2023, section 3.2).
    """

    def __init__(self, width: int, heads: int, operations: ModuleType | Any) -> None:
        super().__init__()
        self.norm_self = operations.LayerNorm(width)
        self.attend_self = Attention(width, heads, operations)
        self.norm_memory = operations.LayerNorm(width)
        self.attend_memory = Attention(width, heads, operations)
        self.norm_feed = operations.LayerNorm(width)
        self.feed_in = operations.Linear(width, 4 * width)
        self.feed_out = operations.Linear(4 * width, width)
        self.modulate = operations.Linear(width, 6 * width, bias=False)

    def forward(self, x_BMC: Tensor, memory_BLC: Tensor, modulation_BC: Tensor) -> Tensor:
        """Returns (B, M, C)."""
        of_self, of_memory, of_feed = self.modulate(modulation_BC)[:, None].chunk(3, dim=-1)
        normed = modulated(self.norm_self(x_BMC), of_self)
        x_BMC = x_BMC + self.attend_self(normed, normed)
        x_BMC = x_BMC + self.attend_memory(modulated(self.norm_memory(x_BMC), of_memory), memory_BLC)
        hidden = F.gelu(self.feed_in(modulated(self.norm_feed(x_BMC), of_feed)))
        return x_BMC + self.feed_out(hidden)


def modulated(x_BMC: Tensor, by_B1D: Tensor) -> Tensor:
    """Returns x (1 + scale) + shift; D is 2 C, scale and shift."""
    scale_B1C, shift_B1C = by_B1D.chunk(2, dim=-1)
    return x_BMC * (1.0 + scale_B1C) + shift_B1C


class HyperNetwork(nn.Module):
    """Perception, one query token per adapted module, decoder, one shared linear head, and a static part.

    Only B_aux starts at zero: the adapted model begins as the base model, B_aux receives a gradient
    at the first step and everything else by the second.
    """

    def __init__(
        self,
        config: HyperNetworkConfig,
        targets: Sequence[Target],
        feature_channels: Sequence[int],
        text_channels: int,
        operations: ModuleType | Any = nn,
    ) -> None:
        super().__init__()
        self.config = config
        self.targets = tuple(targets)
        self.feature_channels, self.text_channels = tuple(feature_channels), text_channels
        self.a_aux = nn.ParameterList(_scaled_normal(config.a, t.in_features) for t in self.targets)
        self.b_aux = nn.ParameterList(torch.zeros(t.out_features, config.b) for t in self.targets)
        count, numbers = len(self.targets), config.rank * (config.a + config.b)
        self.static_factors = nn.Parameter(torch.randn(count, numbers))
        if config.conditioning == "none":
            return
        self.perception = Perception(self.feature_channels, text_channels, config.width, operations)
        self.queries = nn.Parameter(torch.zeros(count, config.width))
        self.decoder = nn.ModuleList(
            DecoderLayer(config.width, config.heads, operations) for _ in range(config.layers)
        )
        self.head_norm = operations.LayerNorm(config.width)
        self.token_statistics = Statistics(count, config.width)
        self.head = unit_linear(config.width, numbers, operations)

    @property
    def is_static(self) -> bool:
        """Whether the same core serves every row."""
        return self.config.conditioning != "full"

    def aux(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns A_aux (a, d_in) and B_aux (d_out, b) of one target."""
        return self.a_aux[index], self.b_aux[index]

    def factors(self, perceived: Perceived) -> tuple[Tensor, Tensor]:
        """Returns B_hyper (B, M, b, r) and A_hyper (B, M, r, a), in float32."""
        numbers_BMF = self.static_factors.float().expand(perceived.rows, -1, -1)
        if self.config.conditioning != "none":
            conditional_BMF = self.head(self.token_statistics(self.tokens(perceived))).float()
            numbers_BMF = conditional_BMF + numbers_BMF.to(conditional_BMF.device)
        rank, a, b = self.config.rank, self.config.a, self.config.b
        b_numbers, a_numbers = (rank**-0.25 * numbers_BMF).split([rank * b, rank * a], dim=-1)
        return b_numbers.unflatten(-1, (b, rank)), a_numbers.unflatten(-1, (rank, a))

    def forward(self, perceived: Perceived) -> Tensor:
        """Returns the cores K (B, M, b, a), in float32 and in the order of `targets`."""
        return core_matrix(*self.factors(perceived))

    def tokens(self, perceived: Perceived) -> Tensor:
        """Returns the decoded module tokens (B, M, C), before they are standardised for the head."""
        if self.is_static:
            memory_BLC = self.queries.new_zeros(1, 1, self.config.width)
            modulation_BC = memory_BLC[:, 0]
        else:
            memory_BLC, modulation_BC = self.perception(perceived)
        places_MC = index_encoding(len(self.targets), self.config.width, memory_BLC.device)
        tokens_MC = self.queries.to(memory_BLC) + places_MC
        x_BMC = tokens_MC.expand(memory_BLC.shape[0], -1, -1)
        for layer in self.decoder:
            x_BMC = layer(x_BMC, memory_BLC, modulation_BC)
        return self.head_norm(x_BMC)


def _scaled_normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns).mul_(columns**-0.5)
