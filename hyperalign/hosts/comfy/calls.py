"""The arguments of the host's apply_model and predict_noise. No host inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..run_state import Chunk

TEXT_INDEX, OPTIONS_INDEX = 3, 5
"""Positions of c_crossattn and transformer_options among the arguments of the host's apply_model."""
MODEL_OPTIONS_INDEX = 2
"""Position of model_options among the arguments of the host's predict_noise."""


@contextlib.contextmanager
def eager(model: Any, unet: nn.Module) -> Iterator[None]:
    """Runs a base model uncompiled: an early exit has no place in a compiled graph."""
    original = model.diffusion_model
    model.diffusion_model = unet
    try:
        yield
    finally:
        model.diffusion_model = original


def options_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the call's transformer_options."""
    return args[OPTIONS_INDEX] if len(args) > OPTIONS_INDEX else kwargs.get("transformer_options", {})


def evaluation_options(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the transformer_options of a whole evaluation."""
    given = args[MODEL_OPTIONS_INDEX] if len(args) > MODEL_OPTIONS_INDEX else kwargs.get("model_options", {})
    return given.get("transformer_options", {})


def text_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the call's text tokens (B, L, C).

    The host repeats those of shorter prompts until all samples of a call have equally many.
    """
    return args[TEXT_INDEX] if len(args) > TEXT_INDEX else kwargs["c_crossattn"]


def will_be_compiled(options: Mapping[str, Any]) -> bool:
    """Returns whether the host's TorchCompileModel acts on a call, before or after our own wrapper."""
    return "torch.compile" in options.get("wrappers", {}).get("apply_model", {})


def chunks_of(x_BCHW: Tensor, options: Mapping[str, Any]) -> list[Chunk]:
    """Returns the conditionings whose samples follow one after the other in a call."""
    roles: Sequence[int] = options.get("cond_or_uncond") or [0]
    sources: Sequence[Any] = options.get("uuids") or [None] * len(roles)
    shape = (x_BCHW.shape[0] // len(roles), *x_BCHW.shape[1:])
    return [Chunk(source, role, shape) for source, role in zip(sources, roles, strict=True)]


def perception_arguments(
    args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the call's arguments without control and without patches, as the hypernetwork was trained."""
    options = options_of(args, kwargs)
    fresh = {key: options[key] for key in ("optimized_attention_override",) if key in options}
    without_control = [None if index == OPTIONS_INDEX - 1 else value for index, value in enumerate(args)]
    named = {key: value for key, value in kwargs.items() if key != "control"}
    return with_options(without_control, named, fresh)


def with_options(
    args: Sequence[Any], kwargs: dict[str, Any], options: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the call's arguments with other transformer_options."""
    if len(args) > OPTIONS_INDEX:
        return (*args[:OPTIONS_INDEX], options, *args[OPTIONS_INDEX + 1 :]), kwargs
    return tuple(args), {**kwargs, "transformer_options": options}
