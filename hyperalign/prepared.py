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
from .hypernetwork import Attention, HyperNetwork
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
class _SampleProduct:
    """x W + b with a weight and a bias of each sample's own."""

    weight_BOI: Tensor
    bias_B1O: Tensor

    def __call__(self, x_BMI: Tensor) -> Tensor:
        return torch.baddbmm(self.bias_B1O, x_BMI, self.weight_BOI.transpose(1, 2))


@dataclass(frozen=True, slots=True)
class _Residuals:
    """What a decoder layer adds to its tokens."""

    of_self: _Product
    of_memory: _Product
    of_feed_CH: Tensor
    """With its bias as the weight of the hidden unit that is always `CONSTANT`."""


CONSTANT = 10.0
"""A value that GELU leaves as it is in float32."""
SPARE = 4
"""Hidden units that are added for the constant one: as many as keep the products' rows aligned."""


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
        self._modulate, self._weights_NGCC = self._modulation(layers)
        self._memory_kv = _Product(*self._joined([m for layer in layers for m in _memory_kv(layer)]))
        self._residuals = [self._residuals_of(layer) for layer in layers]
        tokens_MC = self._of(network.queries) + index_encoding(len(network.targets), config.width, device)
        self._normed_1MC = self._norm(tokens_MC)[None]
        self._first_MC = tokens_MC + self._of(layers[0].attend_self.to_out.bias)
        self._head_affine = self._norm_and_statistics(network)
        scale = config.rank**-0.25
        self._head_CF = scale * self._of(network.head.weight).t()
        self._static_1MF = scale * self._of(network.static_factors)[None]

    def __call__(self, perceived: Perceived) -> Tensor:
        """Returns the cores K (B, M, b, a), those of the hypernetwork up to rounding."""
        prompt_BC = F.silu(self._project_text(self._standardise_text(perceived.prompt_BC)))
        products = self._products(prompt_BC)
        memory = self._memory_kv(self._memory(perceived.features)).chunk(2 * len(products), dim=-1)
        # The first layer's tokens are the same for every sample: normed already, and with a bias in them.
        x_BMC, normed_BMC = self._first_MC, self._normed_1MC.expand(perceived.rows, -1, -1)
        for number, (product, add) in enumerate(zip(products, self._residuals, strict=True)):
            of_self, of_memory, of_feed = product
            if number:
                normed_BMC = self._norm(x_BMC)
            attended_BMC = self._attend(*of_self(normed_BMC).chunk(3, dim=-1))
            if number:
                x_BMC = x_BMC + add.of_self(attended_BMC)
            else:
                x_BMC = _plus_product(x_BMC, attended_BMC, add.of_self.weight_OI.t())
            k, v = memory[2 * number : 2 * number + 2]
            x_BMC = x_BMC + add.of_memory(self._attend(of_memory(self._norm(x_BMC)), k, v))
            x_BMC = _plus_product(x_BMC, F.gelu(of_feed(self._norm(x_BMC))), add.of_feed_CH.t())
        return self._cores(self._head_affine(self._norm(x_BMC)))

    def _products(self, prompt_BC: Tensor) -> list[list[_SampleProduct]]:
        """Returns what each layer's norms go into, modulated: W ((1 + s) x + t) = (W (1 + s)) x + W t."""
        layers, groups, width, _ = self._weights_NGCC.shape
        scales, biases = self._modulate(prompt_BC).unflatten(1, (2, layers, groups, width)).unbind(1)
        weights_BNOI = (self._weights_NGCC * scales[..., None, :]).flatten(2, 3)
        biases_BN1O = biases.flatten(2)[:, :, None]
        sizes = [3 * width, width, 4 * width + SPARE, width - SPARE]

        def split(weight_BOI: Tensor, bias_B1O: Tensor) -> list[_SampleProduct]:
            parts = zip(weight_BOI.split(sizes, dim=1), bias_B1O.split(sizes, dim=2), strict=True)
            return [_SampleProduct(weight, bias) for weight, bias in parts][:3]

        return [split(*each) for each in zip(weights_BNOI.unbind(1), biases_BN1O.unbind(1), strict=True)]

    def _memory(self, features: Sequence[Tensor]) -> Tensor:
        tokens: list[Tensor] = []
        levels = zip(pool_features(features), self._standardise, self._project_CW, strict=True)
        for feature, standardise, project_CW in levels:
            x_BLC = standardise(feature.flatten(2).transpose(1, 2))
            place_LC = grid_encoding(feature.shape[-2], feature.shape[-1], self._width, feature.device)
            tokens.append(_plus_product(place_LC, x_BLC, project_CW, beta=PLACE_SCALE))
        return torch.cat(tokens, dim=1)

    def _cores(self, x_BMC: Tensor) -> Tensor:
        numbers_BMF = _plus_product(self._static_1MF, x_BMC, self._head_CF)
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

    def _modulation(self, layers: Sequence[Any]) -> tuple[_Product, Tensor]:
        """Returns what makes scales and biases of the prompt, and the weights W that they modulate.

        Weights come in groups of `width` outputs: queries, keys, values, queries of the memory, four groups
        of hidden units, and one whose first unit is constant. They multiply (x w + b) (1 + s) + t, where w
        and b are the norm's own; s and t are linear in the prompt, and so are scale and bias of the product.
        """
        weights: list[Tensor] = []
        scales: list[tuple[Tensor, Tensor]] = []
        biases: list[tuple[Tensor, Tensor]] = []
        for layer in layers:
            parts = self._of(layer.modulate.weight).chunk(6)
            norms: list[Any] = [layer.norm_self, layer.norm_memory, layer.norm_feed]
            for norm, linears, s_CP, t_CP in zip(norms, _inputs(layer), parts[::2], parts[1::2], strict=True):
                w_C, b_C = self._of(norm.weight), self._of(norm.bias)
                weight_OC, bias_O = self._joined(linears)
                for group_CC, bias_C in zip(weight_OC.split(len(w_C)), bias_O.split(len(w_C)), strict=True):
                    weights.append(group_CC)
                    scales.append((w_C[:, None] * s_CP, w_C))
                    biases.append((group_CC @ (b_C[:, None] * s_CP + t_CP), group_CC @ b_C + bias_C))
            nothing_CC = torch.zeros_like(weights[-1])
            constant_C = F.pad(nothing_CC.new_full((1,), CONSTANT), (0, len(nothing_CC) - 1))
            weights.append(nothing_CC)
            scales.append((nothing_CC, nothing_CC[0]))
            biases.append((nothing_CC, constant_C))
        by_prompt, constants = zip(*scales, *biases, strict=True)
        of_prompt = _Product(torch.cat(by_prompt), torch.cat(constants))
        return of_prompt, torch.stack(weights).unflatten(0, (len(layers), -1))

    def _residuals_of(self, layer: Any) -> _Residuals:
        of_self, of_memory = layer.attend_self.to_out, layer.attend_memory.to_out
        weight_CH, bias_C = self._of(layer.feed_out.weight), self._of(layer.feed_out.bias)
        constant_CS = F.pad(bias_C[:, None] / CONSTANT, (0, SPARE - 1))
        return _Residuals(
            _Product(self._of(of_self.weight), self._of(of_self.bias)),
            _Product(self._of(of_memory.weight), self._of(of_memory.bias)),
            torch.cat([weight_CH, constant_CS], dim=1),
        )

    def _joined(self, linears: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Returns several linear layers of one input as one."""
        weights, biases = ([self._of(getattr(each, name)) for each in linears] for name in ("weight", "bias"))
        return torch.cat(weights), torch.cat(biases)


def _memory_kv(layer: Any) -> tuple[Any, Any]:
    return layer.attend_memory.to_k, layer.attend_memory.to_v


def _inputs(layer: Any) -> list[list[Any]]:
    """Returns the linear layers that each of a decoder layer's norms goes into."""
    attend: Attention = layer.attend_self
    return [[attend.to_q, attend.to_k, attend.to_v], [layer.attend_memory.to_q], [layer.feed_in]]


def _plus_product(x: Tensor, y_BMI: Tensor, weight_IO: Tensor, beta: float = 1.0) -> Tensor:
    """Returns beta x + y W; x may be the same for all samples."""
    return torch.baddbmm(x, y_BMI, weight_IO.expand(len(y_BMI), -1, -1), beta=beta)
