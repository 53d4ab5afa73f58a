"""HyperAlign on a ComfyUI MODEL: patches a clone of a ModelPatcher, never the model itself.

A run is opened by the host's OUTER_SAMPLE wrapper, an evaluation by PREDICT_NOISE; an APPLY_MODEL
wrapper generates the weights that are due and replaces the adapted layers' forward for that one call.
Modules, device and dtype are taken from the call, because the host moves and copies weights at will.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ... import checkpoint
from ...checkpoint import Header, HyperAlign, check_base
from ...errors import HyperAlignError
from ...families import flux, sd3, unet
from ...families.dit import TransformerSpec
from ...hypernetwork import HyperNetwork
from ...schedule import Schedule, Variant
from ...strength import StrengthCurve, TargetStrengths, overlap, scaled
from ...targets import BaseSpec
from ..hooks import TargetHooks
from ..run_state import Chunk, Run
from ..tracing import Recorder, TracedRun
from .calls import chunks_of, eager, options_of, perception_arguments, with_patches
from .perceivers import DownPath, FirstBlocks, Perceiver, PerceptionDone, stop_perception

LOG = logging.getLogger(__name__)
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
    adapter = Adapter(loaded.hyperalign, spec, schedule, strength, window, strength_curve, recorder)
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


def perceiver_of(spec: BaseSpec, perception_blocks: int) -> Perceiver:
    """Returns what gathers the features of a base model. Raises HyperAlignError for a kind without one."""
    if isinstance(spec, TransformerSpec):
        return FirstBlocks(spec, perception_blocks)
    if isinstance(spec, unet.UNetSpec):
        return DownPath(spec.perception_input_blocks)
    raise HyperAlignError(f"HyperAlign cannot look into a {spec.family} model; update HyperAlign.")


class Adapter:
    """The three wrappers of one application of a hypernetwork, and the state of its current run."""

    def __init__(
        self,
        hyperalign: HyperAlign,
        spec: BaseSpec,
        schedule: Schedule,
        strength: float,
        window: tuple[float, float],
        curve: StrengthCurve | None,
        recorder: Recorder | None,
    ) -> None:
        self._network: HyperNetwork = hyperalign.network
        self._mode = hyperalign.header.mode
        self._schedule = schedule
        self._window = window
        self._last_timestep = spec.last_timestep
        self._perceiver = perceiver_of(spec, hyperalign.header.perception_blocks)
        names = [target.name for target in hyperalign.header.targets]
        self._strengths = None if curve is None else TargetStrengths(curve, spec.family, names)
        places = [spec.place(name) for name in names]
        self._hooks = TargetHooks(hyperalign.network, strength, places)
        self._strength = strength
        self._recorder = recorder
        self._run: Run | None = None

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Opens a run and drops its state at the end, also after an error or an interrupt."""
        previous, self._run = self._run, self._new_run()
        self._hooks.new_run()
        try:
            result = executor(*args, **kwargs)
            self._report(self._run)
            self._keep(self._run, result)
            return result
        finally:
            self._run = previous
            self._hooks.new_run()

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Opens an evaluation; all of its calls (cond, uncond, regions) belong together."""
        run = self._run
        if run is None:
            return executor(*args, **kwargs)
        run.begin_evaluation()
        try:
            x0_BCHW = executor(*args, **kwargs)
        finally:
            run.end_evaluation()
        if isinstance(run, TracedRun):
            self._note(run, executor.class_obj.inner_model, args[1], x0_BCHW)
        return x0_BCHW

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs one call with every row's own weights, writing those that are due.

        A gradient may go through the call, but not through what generates the weights.
        """
        model, x_BCHW, sigma_B = executor.class_obj, args[0], args[1]
        # Also where nothing is written or added: graphs compiled with the patches fail on calls without them.
        args, kwargs = with_patches(args, kwargs, self._perceiver.patches)
        if not self._is_active(model, sigma_B):
            return executor(*args, **kwargs)
        strengths_M = self._target_strengths(model, sigma_B)
        if strengths_M is not None and not strengths_M.any():
            return executor(*args, **kwargs)
        run = self._run if self._run is not None else Run(self._schedule)
        u = self._time(model, sigma_B)
        chunks = run.enter_call(chunks_of(x_BCHW, options_of(args, kwargs)), u)
        due = run.due(chunks, u)
        if isinstance(run, TracedRun):
            run.note_strengths(strengths_M)

        def write(features: Sequence[Tensor]) -> None:
            self._write(run, chunks, due, u, features)
            self._set_cores(run, chunks, strengths_M)

        base = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)
        if due and self._network.is_static:
            write([x_BCHW])
        elif due and self._mode == "separate":
            write(self._perceive(model, base, args, kwargs))
        if due and not self._network.is_static and self._mode == "prefix":
            # The unadapted first blocks of this very forward are the perception.
            with self._hooks.installed(base), self._perceiver.collecting(base, x_BCHW, write):
                return executor(*args, **kwargs)
        with self._hooks.installed(base):
            self._set_cores(run, chunks, strengths_M)
            return executor(*args, **kwargs)

    def _is_active(self, model: Any, sigma_B: Tensor) -> bool:
        start, end = (float(model.model_sampling.percent_to_sigma(percent)) for percent in self._window)
        return end <= float(sigma_B.flatten()[0]) <= start

    def _target_strengths(self, model: Any, sigma_B: Tensor) -> Tensor | None:
        """Returns the curve's factor (M,) on each target's strength, None without a curve."""
        if self._strengths is None:
            return None
        return self._strengths.at(float(sigma_B.flatten()[0]), model.model_sampling.percent_to_sigma)

    def _time(self, model: Any, sigma_B: Tensor) -> float:
        """Returns u in [0, 1], 1 being pure noise."""
        return float(model.model_sampling.timestep(sigma_B).flatten()[0]) / self._last_timestep

    @torch.no_grad()
    def _perceive(
        self, model: Any, base: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> list[Tensor]:
        """Returns the unadapted features of each level for the inputs of a call.

        The host's own `_apply_model` prepares the inputs. Patches and control of others are left
        out, so that features are what the hypernetwork was trained on; control nets would also lose
        their tensors to the first of two forwards.
        """
        positional, named = perception_arguments(args, kwargs, self._perceiver.patches)
        collecting = self._perceiver.collecting(base, args[0], stop_perception)
        with eager(model, base), collecting as features, contextlib.suppress(PerceptionDone):
            model._apply_model(*positional, **named)
            raise HyperAlignError(
                "The MODEL ended before its last perception block; update HyperAlign or ComfyUI."
            )
        return features

    @torch.no_grad()
    def _write(
        self, run: Run, chunks: Sequence[Chunk], due: Sequence[int], u: float, features: Sequence[Tensor]
    ) -> None:
        """Generates and keeps the weights of the chunks that are due."""
        per_chunk = [feature.chunk(len(chunks)) for feature in features]
        cores_BMDA = self._network([torch.cat([level[index] for index in due]) for level in per_chunk])
        for index, cores_RMDA in zip(due, cores_BMDA.chunk(len(due)), strict=True):
            run.write(chunks[index], cores_RMDA, u)

    def _set_cores(self, run: Run, chunks: Sequence[Chunk], strengths_M: Tensor | None) -> None:
        """Gives the call its rows' cores; what the run keeps for I and P stays unscaled."""
        cores_BMDA = run.cores(chunks)
        self._hooks.set_cores(cores_BMDA if strengths_M is None else scaled(cores_BMDA, strengths_M))

    def _new_run(self) -> Run:
        return Run(self._schedule) if self._recorder is None else self._recorder.open(self._schedule)

    def _note(self, run: TracedRun, model: Any, sigma_B: Tensor, x0_BCHW: Tensor) -> None:
        """Tells a traced run what an evaluation was, without waiting for the device."""
        run.note_time(model.model_sampling.timestep(sigma_B).flatten()[0] / self._last_timestep)
        if run.keeps_predictions:
            # A sampler may change the prediction in place.
            run.note_prediction(model.process_latent_out(x0_BCHW.detach().clone()))

    def _keep(self, run: Run, samples: object) -> None:
        if self._recorder is not None and isinstance(run, TracedRun):
            self._recorder.keep(run, self._network, self._strength, samples)

    def _report(self, run: Run) -> None:
        LOG.info(
            "HyperAlign run: variant=%s targets=%d/%d evaluations=%d generations=%d",
            run.schedule.variant,
            len(self._hooks.called),
            len(self._network.targets),
            run.evaluations,
            run.generations,
        )
        if run.generations and len(self._hooks.called) < len(self._network.targets):
            LOG.warning(
                "HyperAlign reached only %d of %d layers: another patch or the host bypasses them. "
                "Remove other model patches, or update HyperAlign.",
                len(self._hooks.called),
                len(self._network.targets),
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
    if header.feature_channels != spec.feature_channels:
        raise HyperAlignError(
            f"This hypernetwork reads features of widths {list(header.feature_channels)}, but the "
            f"MODEL's levels have {list(spec.feature_channels)}. Load one trained for this model."
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
