"""Perturbed-attention guidance (PAG): its processors run layers on one part of the batch after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..forwards import replace_forward, restore_forward


def layers_in_parts(base: nn.Module) -> list[nn.Module]:
    """Returns the modules of a base model's attentions that run on parts of the batch."""
    attentions = (
        module
        for module in base.modules()
        if type(getattr(module, "processor", None)).__name__.startswith("PAG")
    )
    return [part for attention in attentions for part in attention.modules()]


@contextlib.contextmanager
def with_whole_batches(layers: Sequence[nn.Module], samples: int) -> Iterator[None]:
    """Runs adapted layers with the whole batch, as each sample has weights of its own.

    PAG gives a layer the samples that it leaves alone, and then, where both run it, those that it perturbs.
    In the batch they stand in that order.

    Args:
        layers: those that run on parts.
        samples: of the whole batch.
    """
    replaced = [(layer, *_replace(layer, samples)) for layer in layers]
    try:
        yield
    finally:
        for layer, forward, original in reversed(replaced):
            restore_forward(layer, forward, original)


def _replace(layer: nn.Module, samples: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    first = 0

    def forward(x_BNI: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal first
        rows = slice(first, first + len(x_BNI))
        if rows.stop > samples:  # not a part that is known
            return original(x_BNI, *args, **kwargs)
        first = rows.stop % samples
        whole_BNI = x_BNI.new_zeros(samples, *x_BNI.shape[1:])
        whole_BNI[rows] = x_BNI
        return original(whole_BNI, *args, **kwargs)[rows]

    original = replace_forward(layer, forward)
    return forward, original
