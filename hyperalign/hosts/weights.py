"""The weights of a run: made of cores when those are new, low-rank or merged. No host inside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .folding import Folded
from .layers import AdaptedLayers, LayerWeights, runs_another_forward
from .merging import MergedWeights, Merging, merged_bytes, obstacle

LOG = logging.getLogger(__name__)
GIB = 2**30
FREE_SHARE = 0.5
"""The part of the free memory that merged weights may take: the base model's activations need the rest."""
SECONDS_PER_LAYER = 40e-6
"""What an adapted layer takes longer than a plain one where launches are what takes the time (an H100)."""
MERGED_BYTES_PER_SECOND = 1e12
"""A merge reads the frozen weights, writes the merged ones, and reads and writes those once more."""

_Key = tuple[Tensor, float, torch.dtype, bool]
FreeBytes = Callable[[torch.device], int]
HostObstacle = Callable[[nn.Module], str | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """Whether a run's weights are merged, and why."""

    merged: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where the weights of a call go."""

    modules: Sequence[nn.Module]
    """The module of each layer."""
    dtype: torch.dtype
    """The precision in which the base model computes."""
    every_step: bool
    """Whether weights are generated at every step."""
    gradient: bool
    """Whether a gradient is taken through the forward."""
    obstacle: str | None = None
    """Why the host's model as a whole cannot be merged; None if it can."""


class Weights:
    """Makes the weights of adapted layers, and keeps the last ones while the same cores serve."""

    def __init__(
        self,
        layers: AdaptedLayers,
        merging: Merging,
        free_bytes: FreeBytes | None = None,
        host_obstacle: HostObstacle | None = None,
    ) -> None:
        """Makes none yet.

        Args:
            layers: the adapted layers.
            merging: `merged` and `additive` are the two ways; `auto` chooses. What cannot be merged is added.
            free_bytes: how much memory of a device the host can spare.
            host_obstacle: why a layer of the host cannot be merged; None if it can.
        """
        self._layers, self._merging = layers, merging
        self._free_bytes = free_bytes
        self._host_obstacle = host_obstacle or not_a_plain_linear
        self._buffers: dict[tuple[int, torch.dtype, torch.device], MergedWeights] = {}
        self._chosen: dict[int, MergedWeights | None] = {}
        self._known: tuple[_Key, LayerWeights] | None = None

    def begin_run(self) -> None:
        """Forgets the last run's weights and choices; buffers keep their addresses."""
        self._known = None
        self._chosen.clear()

    def end_run(self) -> None:
        """Frees all memory."""
        self._known = None
        self._chosen.clear()
        self._buffers.clear()

    def of(self, cores_BMDA: Tensor, strength: float, place: Place) -> LayerWeights:
        """Returns the weights of each layer, the last ones if the same cores serve."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._layers.fold(cores_BMDA, strength, place.dtype)
        key = (cores_BMDA, strength, place.dtype, place.gradient)
        known = self._known
        if known is None or known[0][0] is not cores_BMDA or known[0][1:] != key[1:]:
            # Normal tensors, which a later evaluation may take a gradient through.
            with torch.inference_mode(False), torch.no_grad():
                folded = self._layers.folding.fold(cores_BMDA, strength, place.dtype)
                known = (key, self.of_folded(folded, len(cores_BMDA), place))
            self._known = known
        return known[1]

    def of_folded(self, folded: Sequence[Folded], samples: int, place: Place) -> LayerWeights:
        """Returns the weights of each layer, given those of each group.

        Where a gradient is taken they are low-rank: a backward pass may come after the next generation, which
        writes merged weights anew.
        """
        merged = None if place.gradient else self._merged(samples, folded[0].up_LKO.device, place)
        if merged is None:
            return self._layers.by_layer(folded, samples)
        self._known = None
        merged.write(folded)
        return merged.weights

    def _merged(self, samples: int, device: torch.device, place: Place) -> MergedWeights | None:
        if samples not in self._chosen:
            choice = self._choice(samples, device, place)
            merged = self._allocated(samples, device, place) if choice.merged else None
            if choice.merged and merged is None:
                choice = Choice(False, "the memory for merged ones could not be had")
            LOG.info("HyperAlign weights: %s, because %s.", _name(choice), choice.reason)
            self._chosen[samples] = merged
        return self._chosen[samples]

    def _choice(self, samples: int, device: torch.device, place: Place) -> Choice:
        if self._merging == "additive":
            return Choice(False, "that was asked for")
        if torch.is_autocast_enabled(device.type):
            return Choice(False, "the model runs under autocast")
        if self._layers.has_constant:
            return Choice(False, "compiled blocks share a graph with blocks that are not adapted")
        linears = [module for module in place.modules if isinstance(module, nn.Linear)]
        why = place.obstacle or obstacle(place.modules, place.dtype, device)
        why = why or next(filter(None, map(self._host_obstacle, place.modules)), None)
        if any(map(runs_another_forward, place.modules)):
            why = "another patch has replaced a layer's forward"
        if why is not None:
            return Choice(False, why)
        needed = merged_bytes(linears, samples)
        known = (samples, place.dtype, device) in self._buffers
        free = needed / FREE_SHARE if known else (self._free_bytes or device_free_bytes)(device)
        if needed > FREE_SHARE * free:
            return Choice(False, f"merged ones take {needed / GIB:.1f} GiB and {free / GIB:.1f} GiB are free")
        if self._merging == "merged":
            return Choice(True, "that was asked for")
        return _cheaper(needed, len(linears), device, place.every_step)

    def _allocated(self, samples: int, device: torch.device, place: Place) -> MergedWeights | None:
        key = (samples, place.dtype, device)
        linears = [module for module in place.modules if isinstance(module, nn.Linear)]
        if key not in self._buffers:
            try:
                self._buffers[key] = MergedWeights(self._layers.folding, linears, samples)
            except torch.OutOfMemoryError:
                return None
        self._buffers[key].use(linears)
        return self._buffers[key]


def _cheaper(needed: int, layers: int, device: torch.device, every_step: bool) -> Choice:
    """Returns the way that takes less time."""
    if device.type == "cpu":
        return Choice(False, "a processor launches nothing")
    if not every_step:
        return Choice(True, "they serve several steps")
    merge, add = 3 * needed / MERGED_BYTES_PER_SECOND, layers * SECONDS_PER_LAYER
    less = merge < add
    words = "less" if less else "more"
    return Choice(less, f"merging {needed / GIB:.1f} GiB a step is {words} than {layers} additions")


def _name(choice: Choice) -> str:
    return "merged for each sample" if choice.merged else "added to the layers' outputs"


def not_a_plain_linear(module: nn.Module) -> str | None:
    """Returns why a layer of diffusers cannot be merged."""
    if type(module).forward is not nn.Linear.forward:
        return f"a layer is a {type(module).__name__} with a forward of its own"
    return None


def device_free_bytes(device: torch.device) -> int:
    """Returns how much memory of a device can still be allocated; without limit on a CPU."""
    if device.type != "cuda":
        return 2**62
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
