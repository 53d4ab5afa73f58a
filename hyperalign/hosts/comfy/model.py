"""HyperAlign on a ComfyUI MODEL: patches a clone of a ModelPatcher, never the model itself.

A run is opened by the host's OUTER_SAMPLE wrapper, an evaluation by PREDICT_NOISE; an APPLY_MODEL
wrapper generates the weights that are due and replaces the adapted layers' forward for that one call.
Modules, device and dtype are taken from the call, because the host moves and copies weights at will.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import comfy.model_management
import comfy.ops
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import nn

from ... import checkpoint
from ...checkpoint import Header, HyperAlign, check_base
from ...errors import HyperAlignError
from ...families import flux, sd3, unet
from ...schedule import Schedule, Variant
from ...strength import StrengthCurve, overlap
from ...targets import BaseSpec
from ..merging import Merging
from ..tracing import Recorder
from .adapter import Adapter

KEY = "hyperalign"
KNOWN = "SD 1.5, SDXL, FLUX.1, SD 3.5 medium and its own tiny model"


@dataclass(frozen=True, slots=True)
class HostHyperAlign:
    """A hypernetwork with the one patcher by which the host loads and unloads it.

    A patcher made for each application would die before the network does, which the host takes for
    a memory leak.
    """

    hyperalign: HyperAlign
    patcher: ModelPatcher

    @property
    def header(self) -> Header:
        """The file's header."""
        return self.hyperalign.header


def load(path: Path) -> HostHyperAlign:
    """Reads a hypernetwork, built from the host's own layers so that it can be offloaded.

    Raises HyperAlignError.
    """
    return hosted(checkpoint.load(path, operations=comfy.ops.manual_cast))


def hosted(hyperalign: HyperAlign) -> HostHyperAlign:
    """Puts a hypernetwork under the host's memory management."""
    return HostHyperAlign(hyperalign, network_patcher(hyperalign.network))


def apply(
    patcher: ModelPatcher,
    loaded: HostHyperAlign,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    variant: Variant | Literal["auto"] = "auto",
    strength_curve: StrengthCurve | None = None,
    recorder: Recorder | None = None,
    merging: Merging = "auto",
) -> ModelPatcher:
    """Returns a clone of the MODEL that samples with generated weights.

    Applying again to the result replaces the first hypernetwork.

    Args:
        patcher: the MODEL; it is not changed.
        loaded: what `load` returned.
        strength: 0 is the model without HyperAlign, bit for bit; 1 as trained.
        start_percent: where in the noise range it begins to act; 0 is pure noise.
        end_percent: where it stops acting; 1 is the finished image.
        variant: when weights are generated; `auto` as the hypernetwork was trained.
        strength_curve: multiplies strength over the run and by block group. Evaluations where it is 0 are the
            model's own, bit for bit, and generate no weights: variant I writes at the first one that is not.
        recorder: is given every run that a sampler makes with the result; None costs nothing.
        merging: whether weights are merged for each sample or added to the layers' outputs; `auto` chooses.

    Raises:
        HyperAlignError: a value out of range, or a hypernetwork for another base model.
    """
    _check_numbers(strength, start_percent, end_percent)
    window = (start_percent, end_percent)
    if strength_curve is not None:
        window = overlap(window, strength_curve.window)
    schedule = loaded.header.schedule
    if variant != "auto":
        schedule = Schedule(variant, schedule.key_times)
    spec = spec_of(patcher.model)
    check_base(loaded.header, spec)
    _check_targets(loaded.header, spec, patcher.model)

    clone = patcher.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.APPLY_MODEL):
        clone.remove_wrappers_with_key(kind, KEY)
    clone.remove_additional_models(KEY)
    if strength == 0.0:
        return clone
    adapter = Adapter(loaded.hyperalign, spec, schedule, strength, window, strength_curve, recorder, merging)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, adapter.outer_sample)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, adapter.predict_noise)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, adapter.apply_model)
    clone.set_additional_models(KEY, [loaded.patcher])
    return clone


def check_strength(strength: float) -> None:
    """Raises HyperAlignError unless a strength is a number."""
    if not math.isfinite(strength):
        raise HyperAlignError(f"strength is {strength}; expected a number, 0 for off and 1 as trained.")


def network_patcher(network: nn.Module) -> ModelPatcher:
    """Puts a module of ours under the host's memory management."""
    return ModelPatcher(
        network,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def spec_of(model: Any) -> BaseSpec:
    """Returns the dimensions of a host BaseModel. Raises HyperAlignError if its kind is not known."""
    config: Mapping[str, Any] = model.model_config.unet_config
    for read in (unet.from_comfy, flux.from_comfy, sd3.from_comfy):
        if (spec := read(config)) is not None:
            return spec
    raise HyperAlignError(
        f"The MODEL is a {type(model).__name__}; HyperAlign knows {KNOWN}. Connect such a model."
    )


def _check_numbers(strength: float, start_percent: float, end_percent: float) -> None:
    check_strength(strength)
    if not 0.0 <= start_percent < end_percent <= 1.0:
        raise HyperAlignError(
            f"start_percent is {start_percent} and end_percent is {end_percent}; expected "
            "0 <= start_percent < end_percent <= 1. Use 0 and 1 for the whole run."
        )


def _check_targets(header: Header, spec: BaseSpec, model: Any) -> None:
    """Finds every target in the model before any sampling. Raises HyperAlignError."""
    if (header.feature_channels, header.text_channels) != (spec.feature_channels, spec.text_channels):
        raise HyperAlignError(
            f"This hypernetwork reads features of widths {list(header.feature_channels)} and text of width "
            f"{header.text_channels}, but the MODEL's have {list(spec.feature_channels)} and "
            f"{spec.text_channels}. Load one trained for this model."
        )
    for target in header.targets:
        try:
            place = spec.place(target.name)
            module: Any = model.diffusion_model.get_submodule(place.path)
        except (AttributeError, KeyError, ValueError) as error:
            raise HyperAlignError(
                f"The MODEL has no layer {target.name}, which this hypernetwork adapts. "
                "Load the base model it was trained on."
            ) from error
        found = (getattr(module, "in_features", None), getattr(module, "out_features", 0))
        last_row = (place.first_row or 0) + target.out_features
        fits = found[1] == last_row if place.first_row is None else found[1] >= last_row
        if found[0] != target.in_features or not fits:
            raise HyperAlignError(
                f"The MODEL's layer {target.name} has widths {found}, the hypernetwork expects "
                f"{(target.in_features, target.out_features)}. Load the base model it was trained on."
            )
