"""Standing in for the forward of a module that Accelerate may offload. No host inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

SLOTS = ("_old_forward", "forward")
"""Where a module's forward lies: Accelerate's offload keeps the one it wraps in the first of them and
puts it back after every run of a pipeline, so that whoever stands there stays."""


def owners(module: nn.Module) -> list[object]:
    """Returns whose methods stand in for a module's forward."""
    return [getattr(module.__dict__.get(slot), "__self__", None) for slot in SLOTS]


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Puts a method of another object into a module; returns what it stands in for."""
    slot = next((slot for slot in SLOTS if slot in module.__dict__), "forward")
    original = getattr(module, slot)
    setattr(module, slot, forward)
    return original


def take_out_forward(module: nn.Module, forward: Callable[..., Any], original: Callable[..., Any]) -> None:
    """Takes `forward` out of a module, wherever offload has moved it meanwhile."""
    for slot in SLOTS:
        if module.__dict__.get(slot) != forward:
            continue
        if slot == "forward" and getattr(original, "__self__", None) is module:
            del module.__dict__[slot]  # the class's own forward shows again
        else:
            setattr(module, slot, original)


@contextlib.contextmanager
def watched(module: nn.Module, seen: Callable[[Any], None]) -> Iterator[None]:
    """Calls `seen` with each output of a module.

    Not a forward hook: torch.compile ignores those that come and go after a graph was made.
    """
    watch = MethodType(_watched_forward, module)
    original = replace_forward(module, watch)
    module.__dict__["hyperalign_watch"] = original, seen
    try:
        yield
    finally:
        take_out_forward(module, watch, original)
        del module.__dict__["hyperalign_watch"]


def _watched(self: Any, *args: Any, **kwargs: Any) -> Any:
    original, seen = self.hyperalign_watch
    output = original(*args, **kwargs)
    _tell(seen, output)
    return output


def _call(seen: Callable[[Any], None], output: Any) -> None:
    seen(output)


# The module's own graphs stay compiled; what is done with its output is no part of them.
_watched_forward = cast(Callable[..., Any], torch.compiler.disable(_watched, recursive=False))
_tell = cast(Callable[..., None], torch.compiler.disable(_call))
