"""Adapted layers: gives them their weights for the length of one forward, in both hosts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..delta import add_delta_
from ..errors import HyperAlignError
from ..hypernetwork import HyperNetwork
from ..targets import Place
from .folding import Folded, Folding, Layer, LowRank, layers_of
from .forwards import is_replaced, replace_forward, restore_forward
from .merging import Merged
from .rows import Rows

LayerWeights = Sequence[LowRank | Merged]
"""The weights of each layer, all of one kind."""


class _Adaptation:
    """What an adapted layer reads as its attribute `hyperalign`.

    While no forward runs it refers to no module: a cycle would keep the base model in memory.
    """

    def __init__(self, outputs: slice | None, rows: Rows) -> None:
        self.first = None if outputs is None else outputs.start
        self.last = None if outputs is None else outputs.stop
        self.rows = rows
        self.down_BID: Tensor | None = None
        self.up_BDO: Tensor | None = None
        self.weight_BIO: Tensor | None = None
        self.bias_O: Tensor | None = None
        self.single_OI: Tensor | None = None
        self.ran = False
        self.original: Any = None

    def take(self, weights: LowRank | Merged | None) -> None:
        """Takes the weights of the next forward; None for none."""
        self.down_BID = self.up_BDO = self.weight_BIO = self.bias_O = self.single_OI = None
        if isinstance(weights, LowRank):
            self.down_BID, self.up_BDO = weights.down_BID, weights.up_BDO
        elif weights is not None:
            self.weight_BIO, self.bias_O = weights.weight_BIO, weights.bias_O
            self.single_OI = weights.single_OI


class AdaptedLayers:
    """The adapted layers of one hypernetwork in a base model.

    Every layer gets the same function as its forward and reads its weights from itself, so that torch.compile
    sees one code for all layers, and new weights as new inputs.
    """

    def __init__(
        self,
        network: HyperNetwork,
        places: Sequence[Place],
        constant: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Groups targets that share a layer.

        Args:
            network: the hypernetwork.
            places: the place of each of its targets, in its order.
            constant: further layers, by path, with their input and output features. Their weights are always
                zero: torch.compile then has one graph for them and for the adapted layers of like blocks.
        """
        self._width = network.config.b
        adapted = layers_of(network, places)
        self.folding = Folding(network, adapted)
        self._adapted = len(adapted)
        self._constant = [Layer(path, (), (), None, shape) for path, shape in (constant or {}).items()]
        self._layers = adapted + self._constant
        self.rows = Rows()
        """Whose rows the layers get, where a host's patches change that."""
        self._adaptations = [_Adaptation(layer.rows, self.rows) for layer in self._layers]
        self._kept_zeros: dict[tuple[int, torch.dtype, torch.device], tuple[LowRank, ...]] = {}
        """Of one batch size, precision and device."""

    @property
    def paths(self) -> list[str]:
        """Path of each layer in the base model; targets of a fused projection share one."""
        return [layer.path for layer in self._layers]

    @property
    def has_constant(self) -> bool:
        """Whether there are layers whose weights are always zero."""
        return bool(self._constant)

    @property
    def targets_reached(self) -> int:
        """How many targets' layers ran since `reset`."""
        pairs = zip(self._layers, self._adaptations, strict=True)
        return sum(len(layer.targets) for layer, adaptation in pairs if adaptation.ran)

    def reset(self) -> None:
        """Forgets which layers ran, and drops their weights."""
        for adaptation in self._adaptations:
            adaptation.ran = False
            adaptation.take(None)

    def fold(self, cores_BMDA: Tensor, strength: float, dtype: torch.dtype) -> tuple[LowRank, ...]:
        """Returns the weights of each layer, stored where the cores are."""
        return self.by_layer(self.folding.fold(cores_BMDA, strength, dtype), len(cores_BMDA))

    def by_layer(self, folded: Sequence[Folded], samples: int) -> tuple[LowRank, ...]:
        """Returns the weights of each layer, given those of each group."""
        adapted = self.folding.by_layer(folded)
        if not self._constant:
            return adapted
        return adapted + self._zeros(samples, adapted[0].up_BDO.dtype, adapted[0].up_BDO.device)

    def give_constant(self, samples: int, dtype: torch.dtype, device: torch.device) -> None:
        """Gives the layers that are not adapted their zeros: they may run before weights are generated."""
        adaptations = self._adaptations[self._adapted :]
        for adaptation, zeros in zip(adaptations, self._zeros(samples, dtype, device), strict=True):
            adaptation.take(zeros)

    def _zeros(self, samples: int, dtype: torch.dtype, device: torch.device) -> tuple[LowRank, ...]:
        """Returns weights of zero, with the strides of those that are folded: torch.compile guards them."""
        key = (samples, dtype, device)
        if key not in self._kept_zeros:
            zeros = partial(torch.zeros, dtype=dtype, device=device)
            self._kept_zeros = {
                key: tuple(
                    LowRank(
                        zeros(samples, self._width, inputs).transpose(-1, -2),
                        zeros(outputs, self._width).t()[None].expand(samples, -1, -1),
                    )
                    for inputs, outputs in (layer.shape for layer in self._constant)
                )
            }
        return self._kept_zeros[key]

    def give(self, weights: LayerWeights, inside: Sequence[int] | None = None) -> None:
        """Gives the layers (those `inside`) their weights, at the latest when the first of them runs."""
        for index in range(len(self._layers)) if inside is None else inside:
            self._adaptations[index].take(weights[index])

    @contextlib.contextmanager
    def installed(self, modules: Sequence[nn.Module], inside: Sequence[int] | None = None) -> Iterator[None]:
        """Adapts the layers (those `inside`) of a model; afterwards each is what it was, whatever happens.

        Args:
            modules: the module of each of `paths`.
            inside: indices of `paths`; None for all.
        """
        installed: list[tuple[nn.Module, Any, Any]] = []
        chosen = range(len(modules)) if inside is None else inside
        try:
            for index in chosen:
                module, adaptation = modules[index], self._adaptations[index]
                forward = MethodType(_over_another if is_replaced(module) else _adapted_forward, module)
                module.__dict__["hyperalign"] = adaptation
                adaptation.original = replace_forward(module, forward)
                installed.append((module, forward, adaptation.original))
            yield
        finally:
            self.rows.forget()
            for module, forward, original in reversed(installed):
                restore_forward(module, forward, original)
                module.__dict__.pop("hyperalign", None)
            for index in chosen:
                adaptation = self._adaptations[index]
                adaptation.original = None
                adaptation.take(None)


def runs_another_forward(module: nn.Module) -> bool:
    """Returns whether a layer, adapted at the moment or not, has another forward than its class and ours."""
    ours = getattr(module.__dict__.get("forward"), "__func__", None) is _adapted_forward
    return is_replaced(module) and not ours


def _adapted_forward(self: Any, x_BNI: Tensor) -> Tensor:
    adaptation: _Adaptation = self.hyperalign
    if adaptation.weight_BIO is None:
        return _with_delta(type(self).forward(self, x_BNI), x_BNI, adaptation)
    adaptation.ran = True
    if adaptation.single_OI is not None:  # copies and tiles of one sample have its weights too
        return F.linear(x_BNI, adaptation.single_OI, adaptation.bias_O)
    if x_BNI.shape[0] == adaptation.weight_BIO.shape[0]:
        return _merged_product(x_BNI, adaptation.weight_BIO, adaptation.bias_O)
    return _merged_rows(x_BNI, adaptation.weight_BIO, adaptation)


def _merged_product(x_BNI: Tensor, weight_BIO: Tensor, bias_O: Tensor | None) -> Tensor:
    """Returns x W + b with each sample's own W: one operator, as the plain layer."""
    return torch.bmm(x_BNI, weight_BIO) if bias_O is None else torch.baddbmm(bias_O, x_BNI, weight_BIO)


def _merged_rows(x_RNI: Tensor, weight_BIO: Tensor, adaptation: _Adaptation) -> Tensor:
    """Returns x W + b where a patch has changed the batch. Raises HyperAlignError.

    The weights are not copied for each row: a sample's rows are one longer sample.
    """
    samples = adaptation.rows.samples_of(x_RNI.shape[0], weight_BIO)
    y_RNO = x_RNI.new_empty(*x_RNI.shape[:-1], weight_BIO.shape[-1])
    for sample in dict.fromkeys(samples):
        own = [row for row, owner in enumerate(samples) if owner == sample]
        y_RNO[own] = F.linear(x_RNI[own], weight_BIO[sample].transpose(0, 1), adaptation.bias_O)
    return y_RNO


def _over_another(self: Any, x_BNI: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a layer that already had another one: an offload hook's, or another patch's."""
    return _with_delta(self.hyperalign.original(x_BNI, *args, **kwargs), x_BNI, self.hyperalign)


def _with_delta(y_BNO: Tensor, x_BNI: Tensor, adaptation: _Adaptation) -> Tensor:
    """Adds the layer's change to its output in place. Raises HyperAlignError."""
    adaptation.ran = True
    down_BID, up_BDO = adaptation.down_BID, adaptation.up_BDO
    if down_BID is None or up_BDO is None:
        raise HyperAlignError(
            "An adapted layer ran before its weights were generated; another patch reorders the model. "
            "Remove that patch."
        )
    if x_BNI.shape[0] != down_BID.shape[0]:
        down_BID = down_BID[adaptation.rows.samples_of(x_BNI.shape[0], down_BID)]
        up_BDO = up_BDO[:1].expand(len(down_BID), -1, -1)
    rows_BNO = y_BNO if adaptation.first is None else y_BNO[..., adaptation.first : adaptation.last]
    add_delta_(rows_BNO, x_BNI, down_BID, up_BDO)
    return y_BNO
