"""The arguments of the host's apply_model, and the collector of features inside its U-Net. No host inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .run_state import Chunk

OPTIONS_INDEX = 5
"""Position of transformer_options among the arguments of the host's apply_model."""


class PerceptionDone(Exception):
    """Ends a forward once the down path has been seen."""


class Collector:
    """The host's `input_block_patch`: gathers each level's last feature and hands them on at the end."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self._blocks = tuple(blocks)
        self._features: list[Tensor] = []
        self._done: Callable[[Sequence[Tensor]], None] | None = None
        # One object for all calls: torch.compile guards on its identity.
        self.patch = torch.compiler.disable(self._collect)

    @contextlib.contextmanager
    def collecting(self, done: Callable[[Sequence[Tensor]], None]) -> Iterator[list[Tensor]]:
        """Fills the list with one (B, C, H, W) feature per level, then calls `done` with it."""
        features: list[Tensor] = []
        self._features, self._done = features, done
        try:
            yield features
        finally:
            self._features, self._done = [], None

    def _collect(self, h_BCHW: Tensor, transformer_options: Mapping[str, Any]) -> Tensor:
        block = transformer_options["block"][1]
        if self._done is not None and block in self._blocks:
            self._features.append(h_BCHW)
            if block == self._blocks[-1]:
                self._done(self._features)
        return h_BCHW


def stop_perception(_: Sequence[Tensor]) -> None:
    """Ends the forward by PerceptionDone."""
    raise PerceptionDone


@contextlib.contextmanager
def eager(model: Any, unet: nn.Module) -> Iterator[None]:
    """Runs a model's U-Net uncompiled: an early exit has no place in a compiled graph."""
    original = model.diffusion_model
    model.diffusion_model = unet
    try:
        yield
    finally:
        model.diffusion_model = original


def options_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the call's transformer_options."""
    return args[OPTIONS_INDEX] if len(args) > OPTIONS_INDEX else kwargs.get("transformer_options", {})


def chunks_of(x_BCHW: Tensor, options: Mapping[str, Any]) -> list[Chunk]:
    """Returns the conditionings whose rows lie one after the other in a call."""
    roles: Sequence[int] = options.get("cond_or_uncond") or [0]
    sources: Sequence[Any] = options.get("uuids") or [None] * len(roles)
    shape = (x_BCHW.shape[0] // len(roles), *x_BCHW.shape[1:])
    return [Chunk(source, role, shape) for source, role in zip(sources, roles, strict=True)]


def with_collector(
    args: Sequence[Any], kwargs: dict[str, Any], collector: Collector
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the call's arguments with the collector ahead of the other input block patches."""
    options = options_of(args, kwargs)
    patches: Mapping[str, Any] = options.get("patches", {})
    blocks = [collector.patch, *patches.get("input_block_patch", [])]
    return _replace_options(args, kwargs, {**options, "patches": {**patches, "input_block_patch": blocks}})


def perception_arguments(
    args: Sequence[Any], kwargs: dict[str, Any], collector: Collector
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the call's arguments without control and without anybody's patches but the collector."""
    options = options_of(args, kwargs)
    kept = {key: options[key] for key in ("optimized_attention_override",) if key in options}
    fresh = {**kept, "patches": {"input_block_patch": [collector.patch]}}
    without_control = [None if index == OPTIONS_INDEX - 1 else value for index, value in enumerate(args)]
    named = {key: value for key, value in kwargs.items() if key != "control"}
    return _replace_options(without_control, named, fresh)


def _replace_options(
    args: Sequence[Any], kwargs: dict[str, Any], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > OPTIONS_INDEX:
        return (*args[:OPTIONS_INDEX], options, *args[OPTIONS_INDEX + 1 :]), kwargs
    return tuple(args), {**kwargs, "transformer_options": options}
