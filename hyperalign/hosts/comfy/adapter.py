"""The wrappers by which a ComfyUI MODEL samples with generated weights."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import torch
from torch import Tensor, nn

from ...checkpoint import HyperAlign
from ...errors import HyperAlignError
from ...families.dit import TransformerSpec
from ...families.unet import UNetSpec
from ...hypernetwork import HyperNetwork
from ...schedule import Schedule
from ...strength import StrengthCurve, TargetStrengths
from ...targets import BaseSpec
from ..features import FeatureMap, ImageTokens, PerceptionDone, collecting, first_output, stop_forward
from ..generation import Generator
from ..layers import AdaptedLayers
from ..merging import Merging
from ..run_state import Run, Time
from ..tracing import Recorder, TracedRun
from ..weights import Place, Weights
from .attention import watching
from .calls import (
    chunks_of,
    eager,
    evaluation_options,
    options_of,
    perception_arguments,
    text_of,
    will_be_compiled,
    with_options,
)
from .run import AdaptedModel, Call, Sampling, turn

LOG = logging.getLogger(__name__)
WHOLE_RUN = (0.0, 1.0)


class Adapter:
    """The three wrappers of one application of a hypernetwork, for any number of runs at a time."""

    def __init__(
        self,
        hyperalign: HyperAlign,
        spec: BaseSpec,
        schedule: Schedule,
        strength: float,
        window: tuple[float, float],
        curve: StrengthCurve | None,
        recorder: Recorder | None,
        merging: Merging,
    ) -> None:
        self.network: HyperNetwork = hyperalign.network
        self._header = hyperalign.header
        self._spec = spec
        self._schedule = schedule
        self._window = window
        names = [target.name for target in hyperalign.header.targets]
        self._strengths = None if curve is None else TargetStrengths(curve, spec.family, names)
        self._places = [spec.place(name) for name in names]
        self.strength = strength
        self._merging: Merging = merging
        self._recorder = recorder
        self._key = f"hyperalign {uuid.uuid4()}"
        """Of the run in the host's transformer_options, which go with it into all of its threads."""

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Opens a run and drops its state at the end, also after an error or an interrupt."""
        guider, run = executor.class_obj, self._new_run()
        sampling = Sampling(run, self._adapt_for_a_run)
        before = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(before)
        guider.model_options.setdefault("transformer_options", {})[self._key] = sampling
        try:
            result = executor(*args, **kwargs)
            self._report(sampling)
            self._keep(run, result)
            return result
        finally:
            guider.model_options = before
            sampling.close()

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Opens an evaluation; all of its calls (cond, uncond, regions) belong together."""
        sampling: Sampling | None = evaluation_options(args, kwargs).get(self._key)
        if sampling is None:
            return executor(*args, **kwargs)
        run = sampling.run
        run.begin_evaluation()
        try:
            x0_BCHW = executor(*args, **kwargs)
        finally:
            run.end_evaluation()
        if isinstance(run, TracedRun):
            self._note(run, executor.class_obj.inner_model, args[1], x0_BCHW)
        return x0_BCHW

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs one call with weights for each of its samples, generating those that are due.

        A gradient may go through the call, but not through the generation.
        """
        options = dict(options_of(args, kwargs))
        sampling: Sampling | None = options.pop(self._key, None)
        args, kwargs = with_options(args, kwargs, options)  # a compiled model need not know the run
        model, sigma_B = executor.class_obj, args[1]
        if not self._is_active(model, sigma_B):
            return executor(*args, **kwargs)
        strengths_M = self._target_strengths(model, sigma_B)
        if strengths_M is not None and not strengths_M.any():
            return executor(*args, **kwargs)
        if sampling is None:  # a guider that the host does not know: every call stands alone
            sampling = Sampling(Run(self._schedule), self._adapt)
        base = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)
        with turn(base):
            return self._called(executor, args, kwargs, base, sampling, strengths_M)

    def _called(
        self,
        executor: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        base: nn.Module,
        sampling: Sampling,
        strengths_M: Tensor | None,
    ) -> Any:
        """Returns the output of an active call."""
        model, x_BCHW, options = executor.class_obj, args[0], options_of(args, kwargs)
        adapted, time = sampling.model(base), self._time(model, args[1])
        place = self._place(model, adapted)
        text_BLC = text_of(args, kwargs).to(x_BCHW.device)  # the host moves it in its own `_apply_model`
        chunks = chunks_of(x_BCHW, options)
        call = Call(sampling, adapted, chunks, time, text_BLC, self.strength, strengths_M, place)
        is_compiled = base is not model.diffusion_model or will_be_compiled(options)
        in_forward = bool(call.due) and self._generates_in_forward(is_compiled)
        if in_forward:
            adapted.generator.prepare(x_BCHW.device)  # before the forward, which may be compiled
        if not call.due:
            call.give_weights()
        elif not in_forward:
            call.generate([] if self.network.is_static else self._perceive(model, base, args, kwargs))
        with adapted.layers.installed(place.modules), contextlib.ExitStack() as stack:
            if in_forward:
                # The unadapted first blocks of this very forward are the perception.
                stack.enter_context(collecting(*self._perception(base, x_BCHW), call.generate, traced=True))
            if isinstance(self._spec, UNetSpec):
                # The attention patches of other families get and return something else.
                args, kwargs = with_options(args, kwargs, watching(options, adapted.layers.rows))
            result = executor(*args, **kwargs)
        call.store()
        return result

    def _adapt(self, base: nn.Module) -> AdaptedModel:
        """Returns a base model with adapted layers of its own."""
        layers = AdaptedLayers(self.network, self._places)
        weights = Weights(layers, self._merging, free_bytes, not_plain)
        return AdaptedModel(base, layers, Generator(self.network, layers, weights))

    def _adapt_for_a_run(self, base: nn.Module) -> AdaptedModel:
        adapted = self._adapt(base)
        adapted.generator.begin_run()
        return adapted

    def _place(self, model: Any, adapted: AdaptedModel) -> Place:
        """Returns where the weights of a call go."""
        every_step = self._schedule.variant == "S"
        dtype, gradient = _compute_dtype(model), torch.is_grad_enabled()
        return Place(adapted.modules, dtype, every_step, gradient, _changes_in_runs(model))

    def _generates_in_forward(self, is_compiled: bool) -> bool:
        """Returns whether the hypernetwork runs in the middle of the adapted forward.

        In `prefix` mode it does. A compiled forward must be the same at every step, and that of P and I
        generates weights at some steps only: there the perception blocks run once more, uncompiled.
        """
        if self.network.is_static or self._header.mode == "separate":
            return False
        return not is_compiled or self._schedule.variant == "S"

    def _perception(self, base: Any, x_BCHW: Tensor) -> tuple[list[nn.Module], FeatureMap]:
        """Returns the perception blocks of a base model, and what makes a feature map of their outputs."""
        spec = self._spec
        if isinstance(spec, TransformerSpec):
            path = spec.perception_paths(self._header.perception_blocks)[1]
            height, width = (-(-side // spec.patch) for side in x_BCHW.shape[-2:])
            return [base.get_submodule(path)], ImageTokens((height, width), spec.image_output)
        if isinstance(spec, UNetSpec):
            # The host runs the layers of an input block one by one, without a forward of the block.
            return [base.input_blocks[number][-1] for number in spec.perception_input_blocks], first_output
        raise HyperAlignError(f"HyperAlign knows no perception blocks of a {spec.family} model; update it.")

    @torch.no_grad()
    def _perceive(
        self, model: Any, base: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> list[Tensor]:
        """Returns the unadapted features of each level for the inputs of a call.

        The host's own `_apply_model` prepares the inputs. Patches and control of others are left
        out, so that features are what the hypernetwork was trained on; control nets would also lose
        their tensors to the first of two forwards.
        """
        positional, named = perception_arguments(args, kwargs)
        features = collecting(*self._perception(base, args[0]), stop_forward)
        with eager(model, base), features as found, contextlib.suppress(PerceptionDone):
            model._apply_model(*positional, **named)
            raise HyperAlignError(
                "The MODEL ended before its last perception block; update HyperAlign or ComfyUI."
            )
        return found

    def _is_active(self, model: Any, sigma_B: Tensor) -> bool:
        if self._window == WHOLE_RUN:  # without a look at the device
            return True
        start, end = (float(model.model_sampling.percent_to_sigma(percent)) for percent in self._window)
        return end <= float(sigma_B.flatten()[0]) <= start

    def _target_strengths(self, model: Any, sigma_B: Tensor) -> Tensor | None:
        """Returns the curve's factor (M,) on each target's strength, None without a curve."""
        if self._strengths is None:
            return None
        return self._strengths.at(float(sigma_B.flatten()[0]), model.model_sampling.percent_to_sigma)

    def _time(self, model: Any, sigma_B: Tensor) -> Time:
        """Returns the time of a call, which waits for the device once something asks for it."""
        last = self._spec.last_timestep
        return Time(lambda: float(_time_of(model.model_sampling, sigma_B, last)))

    def _new_run(self) -> Run:
        return Run(self._schedule) if self._recorder is None else self._recorder.open(self._schedule)

    def _note(self, run: TracedRun, model: Any, sigma_B: Tensor, x0_BCHW: Tensor) -> None:
        """Records an evaluation's time and prediction, without waiting for the device."""
        run.note_time(_time_of(model.model_sampling, sigma_B, self._spec.last_timestep))
        if run.keeps_predictions:
            # A sampler may change the prediction in place.
            run.note_prediction(model.process_latent_out(x0_BCHW.detach().clone()))

    def _keep(self, run: Run, samples: object) -> None:
        if self._recorder is not None and isinstance(run, TracedRun):
            self._recorder.keep(run, self.network, self.strength, samples)

    def _report(self, sampling: Sampling) -> None:
        run, targets = sampling.run, len(self.network.targets)
        reached = sampling.targets_reached
        LOG.info(
            "HyperAlign run: variant=%s targets=%d/%d evaluations=%d generations=%d",
            run.schedule.variant, reached, targets, run.evaluations, run.generations,
        )  # fmt: skip
        if sampling.has_acted and reached < targets:
            LOG.warning(
                "HyperAlign reached only %d of %d layers: another patch or the host bypasses them. "
                "Remove other model patches, or update HyperAlign.",
                reached, targets,
            )  # fmt: skip


def _time_of(sampling: Any, sigma_B: Tensor, last_timestep: float) -> Tensor:
    """Returns the time of a noise level as a fraction of the run, 1 being pure noise, without reading it."""
    if isinstance(sampling, comfy.model_sampling.ModelSamplingContinuousEDM):
        # Its own timesteps are log(sigma) / 4.
        low, high = sampling.sigma_min.log(), sampling.sigma_max.log()
        return (sigma_B.flatten()[0].log() - low) / (high - low)
    return sampling.timestep(sigma_B).flatten()[0] / last_timestep


def _compute_dtype(model: Any) -> torch.dtype:
    """Returns the type in which the host runs a BaseModel."""
    return model.get_dtype() if model.manual_cast_dtype is None else model.manual_cast_dtype


def _changes_in_runs(model: Any) -> str | None:
    """Returns why a run cannot go on with merged weights: hooks change the base model meanwhile."""
    patcher = model.current_patcher
    return "hooks change the model's weights while it samples" if patcher and patcher.hook_patches else None


def free_bytes(device: torch.device) -> int:
    """Returns how much memory the host has left on a device."""
    free: Any = comfy.model_management.get_free_memory(device)
    return int(free)


def not_plain(module: nn.Module) -> str | None:
    """Returns why a layer of the host cannot be merged: its weights are patched or cast when it runs."""
    layer: Any = module
    if layer.comfy_cast_weights or layer.weight_function or layer.bias_function:
        return "the host casts, moves or patches a layer's weights when it runs"
    return None
