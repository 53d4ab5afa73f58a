"""Weights of its own for each sample, merged: W + s B K A of every adapted layer. No host inside.

An adapted layer then runs one product, as the plain layer does; the additive way takes two more. Merging
costs memory, and as many bytes of traffic at each generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .folding import Folded, Folding

Merging = Literal["auto", "merged", "additive"]
MERGINGS: tuple[Merging, ...] = get_args(Merging)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Merged:
    """One layer's weights for each sample, and its own bias."""

    weight_BIO: Tensor
    bias_O: Tensor | None
    single_OI: Tensor | None = None
    """The weights where there is one sample: a plain layer's product, which adds the bias as it goes."""


class MergedWeights:
    """The merged weights of all adapted layers, in buffers that are allocated once and written in place.

    Their addresses stay, so that a captured graph goes on reading them.
    """

    def __init__(self, folding: Folding, modules: Sequence[nn.Linear], samples: int) -> None:
        """Allocates the buffers. Raises torch.OutOfMemoryError.

        Args:
            folding: folds the layers' weights.
            modules: the module of each layer.
            samples: of a batch, each with weights of its own.
        """
        self._folding = folding
        self._expanded: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode(False):  # else only an inference could write them
            self._merged = [
                _empty_like(modules[group.layers[0]].weight, len(group.layers), samples)
                for group in folding.groups
            ]
        self._modules: list[nn.Linear] = []
        self.weights: tuple[Merged, ...] = ()
        """Of each layer, in the order of the layers: views of the buffers."""
        self.use(modules)

    def use(self, modules: Sequence[nn.Linear]) -> None:
        """Takes the frozen weights and biases from these modules, which hosts may move between runs."""
        self._modules = list(modules)
        found: dict[int, Merged] = {}
        for group, merged_LBOI in zip(self._folding.groups, self._merged, strict=True):
            for index, merged_BOI in zip(group.layers, merged_LBOI, strict=True):
                single_OI = merged_BOI[0] if len(merged_BOI) == 1 else None
                found[index] = Merged(merged_BOI.transpose(-1, -2), modules[index].bias, single_OI)
        self.weights = tuple(found[index] for index in range(len(modules)))

    def write(self, folded: Sequence[Folded]) -> None:
        """Merges weights that were folded in the base model's precision."""
        modules = self._modules
        grouped = list(zip(self._folding.groups, self._merged, strict=True))
        own = [
            (merged_BOI, modules[index].weight)
            for group, merged_LBOI in grouped
            for index, merged_lBOI in zip(group.layers, merged_LBOI, strict=True)
            for merged_BOI in merged_lBOI
        ]
        foreach_copy_([merged for merged, _ in own], [weight for _, weight in own])
        for (group, merged_LBOI), weights, up in zip(grouped, folded, self._ups(folded), strict=True):
            rows = self._folding.layers[group.layers[0]].rows
            adapted_LBOI = merged_LBOI if rows is None else merged_LBOI[:, :, rows]
            adapted_LBOI.flatten(0, 1).baddbmm_(up, weights.down_LBIK.transpose(-1, -2).flatten(0, 1))

    def _ups(self, folded: Sequence[Folded]) -> list[Tensor]:
        """Returns up^T (L B, O, K) of each group, repeated for the samples once as long as they stay."""
        kept = [up_LKO for up_LKO, _ in self._expanded]
        if len(kept) != len(folded) or any(a is not b.up_LKO for a, b in zip(kept, folded, strict=True)):
            samples = self._merged[0].shape[1]
            self._expanded = [
                (each.up_LKO, each.up_LKO.transpose(-1, -2).repeat_interleave(samples, dim=0))
                for each in folded
            ]
        return [up for _, up in self._expanded]


def _empty_like(weight_OI: Tensor, layers: int, samples: int) -> Tensor:
    return torch.empty(layers, samples, *weight_OI.shape, dtype=weight_OI.dtype, device=weight_OI.device)


def foreach_copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies many tensors in a few launches."""
    torch.ops.aten._foreach_copy_.default(targets, sources)


def merged_bytes(modules: Sequence[nn.Linear], samples: int) -> int:
    """Returns the size of the merged weights of these layers."""
    return samples * sum(module.weight.nbytes for module in modules)


def obstacle(modules: Sequence[nn.Module], dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns why these layers cannot be merged, in words that go on 'because'; None if they can.

    Args:
        modules: the module of each layer.
        dtype: the precision in which the base model computes.
        device: where it does.
    """
    if dtype not in DTYPES:
        return f"the model computes in {dtype}"
    for module in modules:
        weight = module.weight if isinstance(module, nn.Linear) else None
        if weight is None:
            return f"a layer is a {type(module).__name__}"
        if type(weight) not in (Tensor, nn.Parameter) or weight.dtype != dtype:
            return f"its weights are kept as {type(weight).__name__} of {weight.dtype}"
        if weight.device != device:
            return f"its weights are on {weight.device}, and the inputs on {device}"
    return None
