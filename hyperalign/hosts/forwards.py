"""Replaces the forward of modules for a while, and puts back what was there. The one place that does so.

Accelerate's offload, diffusers' hooks and other patches replace forwards too. A replacement is put below the
first two, which keep it when they are taken off and wrap it when they come later: it runs where the module
itself does. It is taken out wherever it has been moved meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

SLOTS = ("_old_forward", "forward")
"""Where a module's forward is stored: Accelerate's offload keeps the one it wraps in the first slot and puts
it back after every run of a pipeline, so a replacement in that slot stays."""

_Slot = tuple[dict[str, Any], str]
"""A dictionary, and the key under which it has a forward."""


def _slots(module: nn.Module) -> list[_Slot]:
    """Returns the places that have a module's forward: `SLOTS`, then those of diffusers' hooks."""
    own = module.__dict__
    slots: list[_Slot] = [(own, slot) for slot in SLOTS if slot in own]
    hooks: Any = own.get("_diffusers_hook")
    for reference in hooks._fn_refs if hooks is not None else ():
        # A hook that calls the forward itself keeps it apart from its own.
        key = "forward" if reference.original_forward is None else "original_forward"
        slots.append((vars(reference), key))
    return slots


def _innermost(module: nn.Module) -> _Slot:
    """Returns the place of the forward that wraps no other one of `_slots`; hooks' are partial functions."""
    slots = _slots(module)
    plain = (slot for slot in slots if not isinstance(slot[0][slot[1]], functools.partial))
    return next(plain, slots[0] if slots else (module.__dict__, "forward"))


def owners(module: nn.Module) -> list[object]:
    """Returns the objects whose methods replace a module's forward."""
    hooked = [where[key] for where, key in _slots(module) if where is not module.__dict__]
    own = [module.__dict__.get(slot) for slot in SLOTS]
    return [getattr(forward, "__self__", None) for forward in own + hooked]


def is_replaced(module: nn.Module) -> bool:
    """Returns whether a module has another forward than its class."""
    return any(slot in module.__dict__ for slot in SLOTS)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a module another forward; returns the one it replaces, for `restore_forward`."""
    where, key = _innermost(module)
    original = where[key] if key in where else module.forward
    # Past nn.Module's own __setattr__, which looks through parameters and buffers at every call.
    where[key] = forward
    return original


def restore_forward(module: nn.Module, forward: Callable[..., Any], original: Callable[..., Any]) -> None:
    """Puts `original` back in place of `forward`, in whichever slot that is now."""
    for where, key in _slots(module):
        if where[key] != forward:
            continue
        if where is module.__dict__ and key == "forward" and getattr(original, "__self__", None) is module:
            del where[key]  # the class's own forward shows again
        else:
            where[key] = original


@contextlib.contextmanager
def watched(module: nn.Module, see: Callable[[Any], None], traced: bool = False) -> Iterator[None]:
    """Calls `see` with each output of a module.

    Not a forward hook: torch.compile ignores those that are added or removed after a graph was made.

    Args:
        module: the module to watch.
        see: receives the output.
        traced: lets torch.compile trace `see` as a part of the graph that the module is in. Otherwise `see`
            runs outside of graphs, and one that the module is in the middle of breaks there.
    """
    compiled: Callable[..., Any] | None = module.__dict__.get("_compiled_call_impl")
    if compiled is not None:  # a block compiled on its own: its graph ends before `see`

        def call(*args: Any, **kwargs: Any) -> Any:
            output = compiled(*args, **kwargs)
            see(output)
            return output

        module.__dict__["_compiled_call_impl"] = call
        try:
            yield
        finally:
            module.__dict__["_compiled_call_impl"] = compiled
        return
    watch = MethodType(_traced_watch if traced else _untraced_watch, module)
    original = replace_forward(module, watch)
    module.__dict__["hyperalign_watch"] = original, see
    try:
        yield
    finally:
        restore_forward(module, watch, original)
        del module.__dict__["hyperalign_watch"]


def _traced_watch(self: Any, *args: Any, **kwargs: Any) -> Any:
    original, see = self.hyperalign_watch
    output = original(*args, **kwargs)
    see(output)
    return output


def _watch(self: Any, *args: Any, **kwargs: Any) -> Any:
    original, see = self.hyperalign_watch
    output = original(*args, **kwargs)
    _untraced_see(see, output)
    return output


def _see(see: Callable[[Any], None], output: Any) -> None:
    see(output)


# The module's own graphs stay compiled; what is done with its output is no part of them.
_untraced_watch = cast(Callable[..., Any], torch.compiler.disable(_watch, recursive=False))
_untraced_see = cast(Callable[..., None], torch.compiler.disable(_see))
