"""Adapted layers: gives them their weights for the length of one forward, in both hosts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..delta import add_delta_, down_matrix, up_matrix
from ..errors import HyperAlignError
from ..hypernetwork import HyperNetwork
from ..targets import Place
from .forwards import is_replaced, replace_forward, restore_forward


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's change for each sample: its output gets (x down) up."""

    down_BID: Tensor
    up_DO: Tensor


class _Adaptation:
    """What an adapted layer reads as its attribute `hyperalign`.

    While no forward runs it refers to no module: a cycle would keep the base model in memory.
    """

    def __init__(self, rows: slice | None) -> None:
        self.first = None if rows is None else rows.start
        self.last = None if rows is None else rows.stop
        self.down_BID: Tensor | None = None
        self.up_DO: Tensor | None = None
        self.ran = False
        self.original: Any = None


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of the base model, with the targets that it holds: several where a host fuses projections."""

    path: str
    targets: tuple[int, ...]
    offsets: tuple[int, ...]
    """First output of each target, within `rows`."""
    rows: slice | None
    """The outputs that are adapted; None for all."""
    shape: tuple[int, int]
    """Input features, and how many outputs are adapted."""


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
        self._network = network
        self._layers = _layers(network, places)
        self._adapted = len(self._layers)
        self._constant = [_Layer(path, (), (), None, shape) for path, shape in (constant or {}).items()]
        self._layers += self._constant
        self._adaptations = [_Adaptation(layer.rows) for layer in self._layers]
        self._by_inputs = _by_width([target.in_features for target in network.targets])
        self._by_outputs = _by_width([target.out_features for target in network.targets])
        self._kept_zeros: dict[tuple[int, torch.dtype, torch.device], tuple[LowRank, ...]] = {}
        """Of one batch size, precision and device."""

    @property
    def paths(self) -> list[str]:
        """Path of each layer in the base model; targets of a fused projection share one."""
        return [layer.path for layer in self._layers]

    @property
    def targets_reached(self) -> int:
        """How many targets' layers ran since `reset`."""
        pairs = zip(self._layers, self._adaptations, strict=True)
        return sum(len(layer.targets) for layer, adaptation in pairs if adaptation.ran)

    def reset(self) -> None:
        """Forgets which layers ran, and drops their weights."""
        for adaptation in self._adaptations:
            adaptation.ran = False
            adaptation.down_BID = adaptation.up_DO = None

    def fold(self, cores_BMDA: Tensor, strength: float, dtype: torch.dtype) -> tuple[LowRank, ...]:
        """Returns the weights of each layer; layers of the same width are folded and cast together.

        The weights are stored where the cores are; the host may keep the network itself elsewhere.
        """
        network, device = self._network, cores_BMDA.device
        downs: dict[int, Tensor] = {}
        for group in self._by_inputs:
            a_aux_MAI = torch.stack([network.aux(index)[0] for index in group]).to(device, cores_BMDA.dtype)
            core_MBDA = torch.stack([cores_BMDA[:, index] for index in group])
            down_MBID = down_matrix(a_aux_MAI[:, None], core_MBDA).to(dtype)
            for position, index in enumerate(group):
                downs[index] = down_MBID[position]
        ups: dict[int, Tensor] = {}
        for group in self._by_outputs:
            b_aux_MOD = torch.stack([network.aux(index)[1] for index in group]).to(device)
            up_MDO = up_matrix(b_aux_MOD, strength).to(dtype)
            for position, index in enumerate(group):
                ups[index] = up_MDO[position]
        adapted = tuple(_fused(layer, downs, ups) for layer in self._layers[: self._adapted])
        return adapted + self._zeros(len(cores_BMDA), dtype, device) if self._constant else adapted

    def give_constant(self, samples: int, dtype: torch.dtype, device: torch.device) -> None:
        """Gives the layers that are not adapted their zeros: they may run before weights are generated."""
        adaptations = self._adaptations[self._adapted :]
        for adaptation, zeros in zip(adaptations, self._zeros(samples, dtype, device), strict=True):
            adaptation.down_BID, adaptation.up_DO = zeros.down_BID, zeros.up_DO

    def _zeros(self, samples: int, dtype: torch.dtype, device: torch.device) -> tuple[LowRank, ...]:
        """Returns weights of zero, with the strides of those that are folded: torch.compile guards them."""
        key = (samples, dtype, device)
        if key not in self._kept_zeros:
            width = self._network.config.b
            self._kept_zeros = {
                key: tuple(
                    LowRank(
                        torch.zeros(samples, width, inputs, dtype=dtype, device=device).transpose(-1, -2),
                        torch.zeros(outputs, width, dtype=dtype, device=device).transpose(-1, -2),
                    )
                    for inputs, outputs in (layer.shape for layer in self._constant)
                )
            }
        return self._kept_zeros[key]

    def give(self, weights: Sequence[LowRank], inside: Sequence[int] | None = None) -> None:
        """Gives the layers (those `inside`) their weights, at the latest when the first of them runs."""
        for index in range(len(self._layers)) if inside is None else inside:
            adaptation = self._adaptations[index]
            adaptation.down_BID, adaptation.up_DO = weights[index].down_BID, weights[index].up_DO

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
            for module, forward, original in reversed(installed):
                restore_forward(module, forward, original)
                module.__dict__.pop("hyperalign", None)
            for index in chosen:
                adaptation = self._adaptations[index]
                adaptation.original = adaptation.down_BID = adaptation.up_DO = None


def _adapted_forward(self: Any, x_BNI: Tensor) -> Tensor:
    return _with_delta(type(self).forward(self, x_BNI), x_BNI, self.hyperalign)


def _over_another(self: Any, x_BNI: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a layer that already had another one: an offload hook's, or another patch's."""
    return _with_delta(self.hyperalign.original(x_BNI, *args, **kwargs), x_BNI, self.hyperalign)


def _with_delta(y_BNO: Tensor, x_BNI: Tensor, adaptation: _Adaptation) -> Tensor:
    """Adds the layer's change to its output in place. Raises HyperAlignError."""
    adaptation.ran = True
    down_BID, up_DO = adaptation.down_BID, adaptation.up_DO
    if down_BID is None or up_DO is None:
        raise HyperAlignError(
            "An adapted layer ran before its weights were generated; another patch reorders the model. "
            "Remove that patch."
        )
    samples = down_BID.shape[0]
    if x_BNI.shape[0] != samples:
        down_BID = _tiled(down_BID, x_BNI.shape[0])
    rows_BNO = y_BNO if adaptation.first is None else y_BNO[..., adaptation.first : adaptation.last]
    add_delta_(rows_BNO, x_BNI, down_BID, up_DO)
    return y_BNO


def _tiled(down_BID: Tensor, samples: int) -> Tensor:
    """Repeats weights for a patch that tiles attention, which makes of a sample several neighbours."""
    tiles, rest = divmod(samples, down_BID.shape[0])
    if rest:
        raise HyperAlignError(
            f"A model patch changed the batch of an attention layer to {samples} samples; expected "
            f"a multiple of {down_BID.shape[0]}. Remove that patch or HyperAlign from the model."
        )
    return down_BID.repeat_interleave(tiles, dim=0)


def _layers(network: HyperNetwork, places: Sequence[Place]) -> list[_Layer]:
    by_path: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        by_path.setdefault(place.path, []).append(index)
    return [_layer(network, places, path, indices) for path, indices in by_path.items()]


def _layer(network: HyperNetwork, places: Sequence[Place], path: str, indices: Sequence[int]) -> _Layer:
    starts = [places[index].first_row for index in indices]
    rows = [start for start in starts if start is not None]
    target = network.targets[indices[0]]
    if not rows:
        return _Layer(path, tuple(indices), (0,), None, (target.in_features, target.out_features))
    ends = [start + network.targets[index].out_features for start, index in zip(rows, indices, strict=True)]
    first = min(rows)
    offsets = tuple(row - first for row in rows)
    shape = (target.in_features, max(ends) - first)
    return _Layer(path, tuple(indices), offsets, slice(first, max(ends)), shape)


def _fused(layer: _Layer, downs: dict[int, Tensor], ups: dict[int, Tensor]) -> LowRank:
    """Returns the weights of a layer's targets as one pair: their downs side by side, their ups in blocks."""
    if len(layer.targets) == 1:
        return LowRank(downs[layer.targets[0]], ups[layer.targets[0]])
    blocks = [ups[index] for index in layer.targets]
    width = blocks[0].shape[0]
    up_DO = blocks[0].new_zeros(width * len(blocks), layer.shape[1])
    for number, (offset, block) in enumerate(zip(layer.offsets, blocks, strict=True)):
        up_DO[number * width : (number + 1) * width, offset : offset + block.shape[1]] = block
    return LowRank(torch.cat([downs[index] for index in layer.targets], dim=-1), up_DO)


def _by_width(widths: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for index, width in enumerate(widths):
        groups.setdefault(width, []).append(index)
    return list(groups.values())
