"""What a diffusers model must not be doing while it is aligned; said before it runs."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import HyperAlignError
from ...targets import PerceptionMode
from .adapter import is_a


def check_model(base: nn.Module, mode: PerceptionMode) -> None:
    """Raises HyperAlignError if a base model, as it runs now, cannot be aligned.

    Args:
        base: the base model.
        mode: how the hypernetwork perceives.
    """
    for module in base.modules():
        check_projections(base, module)
        if mode == "separate":
            _check_caches(base, module)


def check_projections(base: nn.Module, module: nn.Module) -> None:
    """Raises HyperAlignError if fused projections run in place of the adapted to_q, to_k and to_v."""
    if _is_fused(module):
        raise HyperAlignError(
            f"The attention projections of the {type(base).__name__} are fused; expected to_q, to_k and to_v "
            "apart, as each has weights of its own. Call its unfuse_qkv_projections() first."
        )


def _check_caches(base: nn.Module, module: Any) -> None:
    """Raises HyperAlignError if a cache would take the hypernetwork's own pass for a step."""
    registry = module.__dict__.get("_diffusers_hook")
    for hook in registry.hooks.values() if registry is not None else ():
        if hook._is_stateful:
            raise HyperAlignError(
                f"The {type(base).__name__} has a cache ({type(hook).__name__}), which would take the pass "
                "in which this hypernetwork reads the first blocks for a step; expected no cache. Call its "
                "disable_cache(), or use a hypernetwork trained in mode prefix."
            )


def _is_fused(module: Any) -> bool:
    """Returns whether an attention runs with fused projections.

    FLUX.1's attentions say so themselves. The others' mark outlives unfusing, which gives them their own
    processors back.
    """
    if is_a(module, "AttentionModuleMixin"):
        return module.fused_projections
    return type(getattr(module, "processor", None)).__name__.startswith("Fused")
