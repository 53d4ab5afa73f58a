"""What cores become: the low-rank weights of each adapted layer, many layers at a time. No host inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..delta import down_matrix, up_matrix
from ..hypernetwork import HyperNetwork
from ..targets import Place


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's change for each sample: its output gets (x down) up."""

    down_BID: Tensor
    up_BDO: Tensor
    """One matrix for all samples, expanded here once and not in every call of the layer."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the base model, with the targets that it holds: several where a host fuses projections."""

    path: str
    targets: tuple[int, ...]
    offsets: tuple[int, ...]
    """First output of each target, within `rows`."""
    rows: slice | None
    """The outputs that are adapted; None for all."""
    shape: tuple[int, int]
    """Input features, and how many outputs are adapted."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of one shape, whose weights are made by the same products."""

    layers: tuple[int, ...]
    targets: tuple[int, ...]
    """Those of its first layer, then those of its second and so on."""


@dataclass(frozen=True, slots=True)
class Folded:
    """The weights of a group's L layers. K is b for each target of a layer."""

    down_LBIK: Tensor
    up_LKO: Tensor


@dataclass(frozen=True, slots=True)
class _Factors:
    """What of a group's weights does not depend on the cores."""

    order_T: Tensor
    """Indices of the group's targets among the cores."""
    a_aux_TAI: Tensor
    up_LKO: Tensor


class Folding:
    """Folds the cores of one hypernetwork for its layers.

    What does not depend on the cores is stacked once for a run that is declared, and anew at each call
    otherwise, as training changes it.
    """

    def __init__(self, network: HyperNetwork, layers: Sequence[Layer]) -> None:
        self._network = network
        self.layers = tuple(layers)
        self.groups = _groups(network, layers)
        self._kept: dict[tuple[object, ...], list[_Factors]] | None = None

    def begin_run(self) -> None:
        """Declares that the hypernetwork stays as it is until `end_run`."""
        self._kept = {}

    def end_run(self) -> None:
        """Drops what was kept for the run."""
        self._kept = None

    def fold(self, cores_BMDA: Tensor, strength: float, dtype: torch.dtype) -> list[Folded]:
        """Returns the weights of each group, folded in the precision of the cores and cast last.

        The weights are stored where the cores are; the host may keep the network itself elsewhere.
        """
        factors = self._factors(cores_BMDA.device, cores_BMDA.dtype, strength, dtype)
        pairs = zip(self.groups, factors, strict=True)
        return [_folded(cores_BMDA, group, each, dtype) for group, each in pairs]

    def by_layer(self, folded: Sequence[Folded]) -> tuple[LowRank, ...]:
        """Returns the weights of each layer, in the order of the layers."""
        found: dict[int, LowRank] = {}
        for group, weights in zip(self.groups, folded, strict=True):
            up_LBKO = weights.up_LKO[:, None].expand(-1, weights.down_LBIK.shape[1], -1, -1)
            pairs = zip(weights.down_LBIK.unbind(), up_LBKO.unbind(), strict=True)
            found |= {index: LowRank(*pair) for index, pair in zip(group.layers, pairs, strict=True)}
        return tuple(found[index] for index in range(len(self.layers)))

    def _factors(
        self, device: torch.device, precision: torch.dtype, strength: float, dtype: torch.dtype
    ) -> list[_Factors]:
        if self._kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._stacked(device, precision, strength, dtype)
        key = (device, precision, strength, dtype)
        if key not in self._kept:
            with torch.inference_mode(False), torch.no_grad():
                self._kept[key] = self._stacked(device, precision, strength, dtype)
        return self._kept[key]

    def _stacked(
        self, device: torch.device, precision: torch.dtype, strength: float, dtype: torch.dtype
    ) -> list[_Factors]:
        aux = [self._network.aux(index) for index in range(len(self._network.targets))]

        def factors(group: Group) -> _Factors:
            a_aux_TAI = torch.stack([aux[index][0] for index in group.targets]).to(device, precision)
            b_aux_TOD = [aux[index][1].to(device) for index in group.targets]
            up_LKO = _ups(self.layers[group.layers[0]], b_aux_TOD, strength).to(dtype)
            return _Factors(torch.tensor(group.targets, device=device), a_aux_TAI, up_LKO)

        return [factors(group) for group in self.groups]


def _ups(layer: Layer, b_aux_TOD: Sequence[Tensor], strength: float) -> Tensor:
    """Returns the up matrices (L, K, O) of layers like this one; the targets of a layer stand in blocks."""
    count = len(layer.targets)
    blocks = [up_matrix(torch.stack(list(b_aux_TOD[number::count])), strength) for number in range(count)]
    if count == 1:
        return blocks[0]
    layers, width = blocks[0].shape[:2]
    up_LOK = blocks[0].new_zeros(layers, layer.shape[1], width * count)
    for number, (offset, up_LDO) in enumerate(zip(layer.offsets, blocks, strict=True)):
        rows = slice(offset, offset + up_LDO.shape[2])
        up_LOK[:, rows, number * width : (number + 1) * width] = up_LDO.transpose(-1, -2)
    return up_LOK.transpose(-1, -2)


def layers_of(network: HyperNetwork, places: Sequence[Place]) -> list[Layer]:
    """Returns the layers that hold a hypernetwork's targets, given the place of each."""
    by_path: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        by_path.setdefault(place.path, []).append(index)
    return [_layer(network, places, path, indices) for path, indices in by_path.items()]


def _layer(network: HyperNetwork, places: Sequence[Place], path: str, indices: Sequence[int]) -> Layer:
    starts = [places[index].first_row for index in indices]
    rows = [start for start in starts if start is not None]
    target = network.targets[indices[0]]
    if not rows:
        return Layer(path, tuple(indices), (0,), None, (target.in_features, target.out_features))
    ends = [start + network.targets[index].out_features for start, index in zip(rows, indices, strict=True)]
    first = min(rows)
    offsets = tuple(row - first for row in rows)
    shape = (target.in_features, max(ends) - first)
    return Layer(path, tuple(indices), offsets, slice(first, max(ends)), shape)


def _groups(network: HyperNetwork, layers: Sequence[Layer]) -> list[Group]:
    by_shape: dict[tuple[object, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        outputs = tuple(network.targets[target].out_features for target in layer.targets)
        by_shape.setdefault(
            (layer.shape, layer.rows and layer.rows.start, layer.offsets, outputs), []
        ).append(index)
    return [
        Group(tuple(indices), tuple(target for index in indices for target in layers[index].targets))
        for indices in by_shape.values()
    ]


def _folded(cores_BMDA: Tensor, group: Group, factors: _Factors, dtype: torch.dtype) -> Folded:
    core_TBDA = cores_BMDA.transpose(0, 1).index_select(0, factors.order_T)
    layers, (samples, width) = len(group.layers), core_TBDA.shape[1:3]
    # One product for all samples of a target: its core's rows follow one after the other.
    down_TIR = down_matrix(factors.a_aux_TAI, core_TBDA.flatten(1, 2))
    down_LSBDI = down_TIR.transpose(-1, -2).unflatten(1, (samples, width)).unflatten(0, (layers, -1))
    down_LBKI = down_LSBDI.transpose(1, 2).flatten(2, 3)  # a copy only where a layer has several targets
    return Folded(down_LBKI.to(dtype).transpose(-1, -2), factors.up_LKO)
