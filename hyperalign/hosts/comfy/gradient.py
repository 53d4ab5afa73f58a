"""Makes the host's networks differentiable with respect to their inputs during one evaluation.

The host loads and samples in inference mode, whose tensors cannot be part of a backward pass, and casts or
moves weights at each call into memory that the next layer may reuse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..forwards import replace_forward, restore_forward

PLAIN: tuple[type[Tensor], ...] = (Tensor, nn.Parameter)
"""Types of weights without quantisation; quantised weights become such tensors when they are used."""


@contextlib.contextmanager
def differentiable(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Enables gradients through networks with `normal_weights`; run the backward pass inside the context."""
    networks = list(networks)
    with cast_again_in_backward(networks), recomputed_in_backward(networks), _training():
        yield


@contextlib.contextmanager
def normal_weights(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Replaces each inference-mode weight by a normal tensor on the same memory inside the context."""
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in (module for network in networks for module in network.modules()):
            tensors: Any = module
            for held in (tensors._parameters, tensors._buffers):
                for name, tensor in held.items():
                    if type(tensor) in PLAIN and tensor.is_inference():
                        replaced.append((held, name, tensor))
                        held[name] = _normal(tensor)
        yield
    finally:
        for held, name, tensor in replaced:
            held[name] = tensor


@contextlib.contextmanager
def cast_again_in_backward(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Casts each layer's weights again in the backward pass instead of keeping the cast weights.

    Kept weights would be a second model in memory, and the host's buffers would already hold the weights of
    later layers.
    """
    modules = (module for network in networks for module in network.modules())
    layers = [module for module in modules if isinstance(module, comfy.ops.CastWeightBiasOp)]
    with _replaced(layers, _cast_again):
        yield


@contextlib.contextmanager
def recomputed_in_backward(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Keeps only the inputs of each block and recomputes the block in the backward pass."""
    with _replaced([block for network in networks for block in _blocks(network)], _recompute):
        yield


@contextlib.contextmanager
def _replaced(modules: Iterable[nn.Module], way: Callable[..., Any]) -> Iterator[None]:
    replaced: list[tuple[nn.Module, Any, Any]] = []
    try:
        for module in modules:
            forward = partial(way, module, module.forward)
            replaced.append((module, forward, replace_forward(module, forward)))
        yield
    finally:
        for module, forward, original in reversed(replaced):
            restore_forward(module, forward, original)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Returns the outermost modules in lists and sequences: residual and transformer blocks."""
    for child in network.children():
        if isinstance(network, (nn.ModuleList, nn.Sequential)) and not isinstance(
            child, (nn.ModuleList, nn.Sequential)
        ):
            if any(True for _ in child.children()):
                yield child
        else:
            yield from _blocks(child)


def with_attention(options: dict[str, Any]) -> dict[str, Any]:
    """Returns transformer options with differentiable attention; fast kernels may lack a backward pass."""
    return {"optimized_attention_override": _attention, **options}


def _attention(_chosen: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)


def _normal(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        memory = tensor.untyped_storage()
        normal = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        normal = normal.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())
        return nn.Parameter(normal, requires_grad=False) if isinstance(tensor, nn.Parameter) else normal


def _recompute(block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not any(tensor.requires_grad for tensor in tensors) or _is_adapted(block):
        return original(*args, **kwargs)
    # The host stores the current block in its options, which then change for the next block.
    args = tuple(dict(value) if isinstance(value, dict) else value for value in args)
    kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
    return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _is_adapted(block: nn.Module) -> bool:
    """Returns whether a layer is patched for this call only; the patch is gone in the backward pass."""
    forwards = (module.__dict__.get("forward") for module in block.modules())
    return any(
        forward is not None and getattr(forward, "func", None) not in (_cast_again, _recompute)
        for forward in forwards
    )


def _cast_again(layer: Any, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not x.requires_grad or _is_used_as_it_is(layer, x):
        return original(x, *args, **kwargs)
    return checkpoint(original, x, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _is_used_as_it_is(module: Any, x: Tensor) -> bool:
    weight: Tensor | None = module.weight
    if weight is None:
        return True
    changed = len(module.weight_function) > 0 or len(module.bias_function) > 0
    return type(weight) in PLAIN and not changed and (weight.dtype, weight.device) == (x.dtype, x.device)


@contextlib.contextmanager
def _training() -> Iterator[None]:
    """Makes hosts with `in_training` avoid operations that have no gradient."""
    management: Any = comfy.model_management
    before: bool = getattr(management, "in_training", False)
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before
