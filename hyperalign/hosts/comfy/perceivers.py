"""What gathers the base model's early features while the host runs it. No host inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ...families.dit import TransformerSpec
from ...perception import token_map
from ..hooks import Forward, restore_forward
from .calls import Patches

Done = Callable[[Sequence[Tensor]], None]
"""Takes one feature map (B, C, H, W) per level, as soon as all are there."""


class PerceptionDone(Exception):
    """Ends a forward once the perception blocks have been seen."""


def stop_perception(_: Sequence[Tensor]) -> None:
    """Ends the forward by PerceptionDone."""
    raise PerceptionDone


class Perceiver(Protocol):
    """Gathers features during a call."""

    @property
    def patches(self) -> Patches:
        """The host's patches that the call must carry."""
        ...

    def collecting(
        self, model: nn.Module, x_BCHW: Tensor, done: Done
    ) -> contextlib.AbstractContextManager[list[Tensor]]:
        """Fills the list with the features of a call on latents `x_BCHW`, then calls `done` with it."""
        ...


class DownPath:
    """Each level's last feature of a U-Net's down path, by the host's `input_block_patch`."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self._blocks = tuple(blocks)
        self._features: list[Tensor] = []
        self._done: Done | None = None
        # One object for all calls: torch.compile guards on its identity.
        self.patches: Patches = {"input_block_patch": [torch.compiler.disable(self._collect)]}

    @contextlib.contextmanager
    def collecting(self, model: nn.Module, x_BCHW: Tensor, done: Done) -> Iterator[list[Tensor]]:
        """Fills the list with one map per level."""
        del model, x_BCHW
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


class FirstBlocks:
    """The image tokens after a transformer's last perception block, by that block's forward."""

    def __init__(self, spec: TransformerSpec, perception_blocks: int) -> None:
        self.patches: Patches = {}
        self._path = spec.perception_paths(perception_blocks)[1]
        self._patch, self._output = spec.patch, spec.image_output
        self._features: list[Tensor] = []
        self._done: Done | None = None
        self._grid = (0, 0)
        self._made: tuple[nn.Module, Forward | None, Forward] | None = None

    @contextlib.contextmanager
    def collecting(self, model: nn.Module, x_BCHW: Tensor, done: Done) -> Iterator[list[Tensor]]:
        """Fills the list with one map of the whole image."""
        block = model.get_submodule(self._path)
        previous: Forward | None = block.__dict__.get("forward")
        features: list[Tensor] = []
        self._features, self._done = features, done
        self._grid = (-(-x_BCHW.shape[-2] // self._patch), -(-x_BCHW.shape[-1] // self._patch))
        block.forward = self._hook(block, previous)
        try:
            yield features
        finally:
            restore_forward(block, previous)
            self._features, self._done = [], None

    def _hook(self, block: nn.Module, previous: Forward | None) -> Forward:
        if self._made is None or self._made[0] is not block or self._made[1] is not previous:
            original: Callable[..., Any] = block.forward

            def forward(*args: object, **kwargs: object) -> Any:
                outputs = original(*args, **kwargs)
                self._seen(outputs[self._output])
                return outputs

            # Kept: torch.compile guards on the identity of hooks.
            self._made = (block, previous, cast(Forward, torch.compiler.disable(forward)))
        return self._made[2]

    def _seen(self, tokens_BLC: Tensor) -> None:
        self._features.append(token_map(tokens_BLC, self._grid))
        if self._done is not None:
            self._done(self._features)
