"""The hypernetwork with all that does not depend on its input worked out: the same cores in fewer operators.

For sampling only. On a fast GPU a generation takes as long as its launches. `HyperNetwork` has more of them:
it keeps the layers of its file apart, and statistics, norms and encodings as operations of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .delta import core_matrix
from .hypernetwork import Attention, DecoderLayer, HyperNetwork
from .perception import PLACE_SCALE, Perceived, grid_encoding, index_encoding, pool_features


@dataclass(frozen=True, slots=True)
class _Affine:
    """x scale + shift, as statistics or a norm has it; one operator."""

    scale: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


@dataclass(frozen=True, slots=True)
class _Product:
    """x W + b."""

    weight_OI: Tensor
    bias_O: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_OI, self.bias_O)


@dataclass(frozen=True, slots=True)
class _Block:
    """A decoder layer without what all layers do at once: modulation, and key and value of the memory."""

    self_qkv: _Product
    self_out: _Product
    memory_q: _Product
    memory_out: _Product
    feed_in: _Product
    feed_out: _Product


class PreparedHyperNetwork:
    """Generates the cores of a hypernetwork whose parameters stay as they are."""

    def __init__(self, network: HyperNetwork, device: torch.device) -> None:
        """Works out everything in float32 on the device.

        Args:
            network: with a decoder that perceives.
            device: of the inputs.
        """
        self._device = device
        config, perception = network.config, network.perception
        layers: list[Any] = list(network.decoder)
        projections: list[Any] = list(perception.projections)
        self._heads, self._width, self._rank = config.heads, config.width, config.rank
        self._sizes = config.b, config.a
        self._standardise = [self._affine(each) for each in perception.feature_statistics]
        self._project_CW = [self._of(each.weight).t().contiguous() for each in projections]
        self._standardise_text = self._affine(perception.text_statistics)
        self._project_text = _Product(self._of(perception.project_text.weight))
        self._modulate = self._modulation(layers)
        self._memory_kv = _Product(*self._joined([m for layer in layers for m in _memory_kv(layer)]))
        self._blocks = [self._block(layer) for layer in layers]
        tokens_MC = self._of(network.queries) + index_encoding(len(network.targets), config.width, device)
        self._tokens_1MC = tokens_MC[None]
        self._normed_1MC = self._norm(self._tokens_1MC)
        self._head_affine = self._norm_and_statistics(network)
        scale = config.rank**-0.25
        self._head_CF = scale * self._of(network.head.weight).t()
        self._static_1MF = scale * self._of(network.static_factors)[None]

    def __call__(self, perceived: Perceived) -> Tensor:
        """Returns the cores K (B, M, b, a), those of the hypernetwork up to rounding."""
        rows, width = perceived.rows, self._width
        prompt_BC = F.silu(self._project_text(self._standardise_text(perceived.prompt_BC)))
        by_norm = self._modulate(prompt_BC).view(rows, -1, 1, 2 * width).unbind(1)
        memory = self._memory_kv(self._memory(perceived.features)).chunk(2 * len(self._blocks), dim=-1)
        x_BMC, normed_BMC = self._tokens_1MC, self._normed_1MC
        for number, block in enumerate(self._blocks):
            of_self, of_memory, of_feed = by_norm[3 * number : 3 * number + 3]
            if number:
                normed_BMC = self._norm(x_BMC)
            q, k, v = block.self_qkv(_modulated(normed_BMC, of_self)).chunk(3, dim=-1)
            x_BMC = x_BMC + block.self_out(self._attend(q, k, v))
            q = block.memory_q(_modulated(self._norm(x_BMC), of_memory))
            k, v = memory[2 * number : 2 * number + 2]
            x_BMC = x_BMC + block.memory_out(self._attend(q, k, v))
            hidden = F.gelu(block.feed_in(_modulated(self._norm(x_BMC), of_feed)))
            x_BMC = x_BMC + block.feed_out(hidden)
        return self._cores(self._head_affine(self._norm(x_BMC)))

    def _memory(self, features: Sequence[Tensor]) -> Tensor:
        tokens: list[Tensor] = []
        levels = zip(pool_features(features), self._standardise, self._project_CW, strict=True)
        for feature, standardise, project_CW in levels:
            x_BLC = standardise(feature.flatten(2).transpose(1, 2))
            place_LC = grid_encoding(feature.shape[-2], feature.shape[-1], self._width, feature.device)
            project_BCW = project_CW.expand(x_BLC.shape[0], -1, -1)
            tokens.append(torch.baddbmm(place_LC, x_BLC, project_BCW, beta=PLACE_SCALE))
        return torch.cat(tokens, dim=1)

    def _cores(self, x_BMC: Tensor) -> Tensor:
        head_BCF = self._head_CF.expand(x_BMC.shape[0], -1, -1)
        numbers_BMF = torch.baddbmm(self._static_1MF, x_BMC, head_BCF)
        b, a = self._sizes
        b_numbers, a_numbers = numbers_BMF.split([self._rank * b, self._rank * a], dim=-1)
        return core_matrix(b_numbers.unflatten(-1, (b, self._rank)), a_numbers.unflatten(-1, (self._rank, a)))

    def _attend(self, q_BMC: Tensor, k_BLC: Tensor, v_BLC: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self._heads, -1)).transpose(1, 2) for x in (q_BMC, k_BLC, v_BLC))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _norm(self, x_BMC: Tensor) -> Tensor:
        """Returns x with mean 0 and deviation 1; scale and shift of the file's norms are in what follows."""
        return F.layer_norm(x_BMC, (self._width,))

    def _of(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device, torch.float32)

    def _affine(self, statistics: Any) -> _Affine:
        """Returns (x - mean) / deviation."""
        scale = 1.0 / self._of(statistics.deviation)
        return _Affine(scale, -self._of(statistics.mean) * scale)

    def _norm_and_statistics(self, network: HyperNetwork) -> _Affine:
        """Returns the head's norm and the statistics of its input, as one."""
        standardise, norm = self._affine(network.token_statistics), network.head_norm
        return _Affine(standardise.scale * self._of(norm.weight), standardise(self._of(norm.bias)))

    def _modulation(self, layers: Sequence[DecoderLayer]) -> _Product:
        """Returns scale and shift of every norm of every layer, its own weight w and bias b in them.

        (x w + b) (1 + s) + t = x w (1 + s) + b (1 + s) + t, where s and t are linear in the prompt.
        """
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for layer in layers:
            parts = self._of(layer.modulate.weight).chunk(6)
            norms: list[Any] = [layer.norm_self, layer.norm_memory, layer.norm_feed]
            for norm, scale_CP, shift_CP in zip(norms, parts[::2], parts[1::2], strict=True):
                w, b = self._of(norm.weight), self._of(norm.bias)
                weights += [w[:, None] * scale_CP, b[:, None] * scale_CP + shift_CP]
                biases += [w, b]
        return _Product(torch.cat(weights), torch.cat(biases))

    def _block(self, layer: Any) -> _Block:
        attend: Attention = layer.attend_self

        def product(linear: Any) -> _Product:
            return _Product(self._of(linear.weight), self._of(linear.bias))

        return _Block(
            self_qkv=_Product(*self._joined([attend.to_q, attend.to_k, attend.to_v])),
            self_out=product(attend.to_out),
            memory_q=product(layer.attend_memory.to_q),
            memory_out=product(layer.attend_memory.to_out),
            feed_in=product(layer.feed_in),
            feed_out=product(layer.feed_out),
        )

    def _joined(self, linears: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Returns several linear layers of one input as one."""
        weights, biases = ([self._of(getattr(each, name)) for each in linears] for name in ("weight", "bias"))
        return torch.cat(weights), torch.cat(biases)


def _memory_kv(layer: Any) -> tuple[Any, Any]:
    return layer.attend_memory.to_k, layer.attend_memory.to_v


def _modulated(x_BMC: Tensor, by_B1D: Tensor) -> Tensor:
    scale_B1C, shift_B1C = by_B1D.chunk(2, dim=-1)
    return torch.addcmul(shift_B1C, x_BMC, scale_B1C)
