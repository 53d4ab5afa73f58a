"""Many small launches as one: captures functions of tensors as CUDA graphs. No host inside."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .merging import foreach_copy_

LOG = logging.getLogger(__name__)
MAX_GRAPHS = 8
"""Shapes that are kept: regions and tiles of a run have their own."""

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Sequence[Tensor]


class Captured:
    """Replays functions of tensors whose code launches the same kernels whenever it runs.

    The first call of a key runs as it is, which warms it up; the second is captured. Outputs of a replay are
    written anew by the next one.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()
        self._failed = False

    def clear(self) -> None:
        """Drops all graphs, with their memory."""
        self._graphs.clear()
        self._failed = False

    def run(
        self, key: Hashable, function: Function, inputs: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], bool]:
        """Returns a function's outputs, and whether the next call overwrites them.

        Args:
            key: of all that the function depends on besides the contents of its inputs.
            function: launches kernels on the current stream and reads no values.
            inputs: on one GPU.
        """
        if self._failed or not can_capture(inputs):
            return function(inputs), False
        if key not in self._graphs:
            self._graphs[key] = None
            while len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
            return function(inputs), False
        graph = self._graphs[key] or self._capture(key, function, inputs)
        if graph is None:
            return function(inputs), False
        foreach_copy_(graph.inputs, list(inputs))
        graph.graph.replay()
        return graph.outputs, True

    def _capture(self, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> _Graph | None:
        try:
            self._graphs[key] = _captured(function, inputs)
        except RuntimeError as error:
            self._failed = True
            LOG.info("HyperAlign generates weights without a CUDA graph, because capturing failed: %s", error)
        return self._graphs[key]


def can_capture(inputs: Sequence[Tensor]) -> bool:
    """Returns whether a call with these inputs may be captured or replayed.

    Only with PyTorch's own allocator: under cudaMallocAsync, ComfyUI's default, a capture that fails leaves
    the process without an allocator. AMD's graphs have not been tried.
    """
    on_gpu = all(tensor.is_cuda for tensor in inputs)
    if not on_gpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.version.hip is not None or torch.cuda.get_allocator_backend() != "native":
        return False
    return not torch.cuda.is_current_stream_capturing()  # then the host's own graph takes the launches


def _captured(function: Function, inputs: Sequence[Tensor]) -> _Graph:
    """Captures on a stream of its own, without torch.cuda.graph's emptying of caches. Raises RuntimeError."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(False), torch.no_grad():
        static = [torch.empty_like(tensor) for tensor in inputs]
        foreach_copy_(static, list(inputs))
        side.wait_stream(current)
        with torch.cuda.stream(side):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                outputs = function(static)
            finally:
                graph.capture_end()
        current.wait_stream(side)
    return _Graph(graph, static, outputs)
