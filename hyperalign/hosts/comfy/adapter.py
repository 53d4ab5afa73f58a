"""The wrappers by which a ComfyUI MODEL samples with generated weights, and the state of their run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_management
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
from ..run_state import Chunk, Run, Time
from ..tracing import Recorder, TracedRun
from ..weights import Place, Weights
from .attention import watching
from .calls import (
    chunks_of,
    eager,
    options_of,
    perception_arguments,
    text_of,
    will_be_compiled,
    with_options,
)

LOG = logging.getLogger(__name__)
WHOLE_RUN = (0.0, 1.0)


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
        merging: Merging,
    ) -> None:
        self.network: HyperNetwork = hyperalign.network
        self._header = hyperalign.header
        self._spec = spec
        self._schedule = schedule
        self._window = window
        names = [target.name for target in hyperalign.header.targets]
        self._strengths = None if curve is None else TargetStrengths(curve, spec.family, names)
        self.strength = strength
        self.layers = AdaptedLayers(hyperalign.network, [spec.place(name) for name in names])
        weights = Weights(self.layers, merging, free_bytes, not_plain)
        self.generator = Generator(hyperalign.network, self.layers, weights)
        self._modules: tuple[nn.Module, list[nn.Module]] | None = None
        """Of the run: the base model and the module of each adapted layer."""
        self._recorder = recorder
        self._run: Run | None = None

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Opens a run and drops its state at the end, also after an error or an interrupt."""
        previous, self._run = self._run, self._new_run()
        self._reset()
        self.generator.begin_run()
        try:
            result = executor(*args, **kwargs)
            self._report(self._run)
            self._keep(self._run, result)
            return result
        finally:
            self._run = previous
            self._reset()

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
        """Runs one call with weights for each of its samples, generating those that are due.

        A gradient may go through the call, but not through the generation.
        """
        model, x_BCHW, sigma_B = executor.class_obj, args[0], args[1]
        if not self._is_active(model, sigma_B):
            return executor(*args, **kwargs)
        strengths_M = self._target_strengths(model, sigma_B)
        if strengths_M is not None and not strengths_M.any():
            return executor(*args, **kwargs)
        run = self._run if self._run is not None else Run(self._schedule)
        time = self._time(model, sigma_B)
        chunks = run.enter_call(chunks_of(x_BCHW, options_of(args, kwargs)), time)
        due = run.due(chunks, time)
        if isinstance(run, TracedRun):
            run.note_strengths(strengths_M)
        base = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)
        place = self._place(model, base)
        text_BLC = text_of(args, kwargs).to(x_BCHW.device)  # the host moves it in its own `_apply_model`
        call = _Call(self, run, chunks, due, time, text_BLC, strengths_M, place)
        is_compiled = base is not model.diffusion_model or will_be_compiled(options_of(args, kwargs))
        in_forward = bool(due) and self._generates_in_forward(is_compiled)
        if in_forward:
            self.generator.prepare(x_BCHW.device)  # before the forward, which may be compiled
        if not due:
            call.give_weights()
        elif not in_forward:
            call.generate([] if self.network.is_static else self._perceive(model, base, args, kwargs))
        with self.layers.installed(place.modules), contextlib.ExitStack() as stack:
            if in_forward:
                # The unadapted first blocks of this very forward are the perception.
                stack.enter_context(collecting(*self._perception(base, x_BCHW), call.generate, traced=True))
            watched = watching(options_of(args, kwargs), self.layers.rows)
            positional, named = with_options(args, kwargs, watched)
            result = executor(*positional, **named)
        call.store()
        return result

    def _place(self, model: Any, base: nn.Module) -> Place:
        """Returns where the weights of a call go."""
        known = self._modules
        if known is None or known[0] is not base:
            known = self._modules = base, [base.get_submodule(path) for path in self.layers.paths]
        every_step = self._schedule.variant == "S"
        dtype, gradient = _compute_dtype(model), torch.is_grad_enabled()
        return Place(known[1], dtype, every_step, gradient, _changes_in_runs(model))

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
        return Time(lambda: float(model.model_sampling.timestep(sigma_B).flatten()[0]) / last)

    def _new_run(self) -> Run:
        return Run(self._schedule) if self._recorder is None else self._recorder.open(self._schedule)

    def _reset(self) -> None:
        self.layers.reset()
        self.generator.end_run()
        self._modules = None

    def _note(self, run: TracedRun, model: Any, sigma_B: Tensor, x0_BCHW: Tensor) -> None:
        """Records an evaluation's time and prediction, without waiting for the device."""
        run.note_time(model.model_sampling.timestep(sigma_B).flatten()[0] / self._spec.last_timestep)
        if run.keeps_predictions:
            # A sampler may change the prediction in place.
            run.note_prediction(model.process_latent_out(x0_BCHW.detach().clone()))

    def _keep(self, run: Run, samples: object) -> None:
        if self._recorder is not None and isinstance(run, TracedRun):
            self._recorder.keep(run, self.network, self.strength, samples)

    def _report(self, run: Run) -> None:
        reached, targets = self.layers.targets_reached, len(self.network.targets)
        LOG.info(
            "HyperAlign run: variant=%s targets=%d/%d evaluations=%d generations=%d",
            run.schedule.variant, reached, targets, run.evaluations, run.generations,
        )  # fmt: skip
        if run.generations and reached < targets:
            LOG.warning(
                "HyperAlign reached only %d of %d layers: another patch or the host bypasses them. "
                "Remove other model patches, or update HyperAlign.",
                reached, targets,
            )  # fmt: skip


class _Call:
    """One call of the model: which weights it generates, and which it reuses."""

    def __init__(
        self,
        adapter: Adapter,
        run: Run,
        chunks: Sequence[Chunk],
        due: Sequence[int],
        time: Time,
        text_BLC: Tensor,
        strengths_M: Tensor | None,
        place: Place,
    ) -> None:
        self._adapter, self._run, self._chunks, self._due, self._time = adapter, run, chunks, due, time
        self._text_BLC, self._strengths_M, self._place = text_BLC, strengths_M, place
        self._generates_all = len(due) == len(chunks)
        self._unstored: Tensor | None = None

    @torch.no_grad()
    def generate(self, features: Sequence[Tensor]) -> None:
        """Generates the cores of the chunks that are due, and gives the layers their weights.

        Where all chunks are due this may be a part of a compiled graph, which leaves the run's state alone.
        """
        adapter = self._adapter
        if self._generates_all:
            self._unstored, weights = adapter.generator.generate(
                features, self._text_BLC, adapter.strength, self._place, self._strengths_M
            )
            adapter.layers.give(weights)
            return
        selected = [self._due_of(feature) for feature in features]
        self._store(adapter.generator.cores(selected, self._due_of(self._text_BLC)))
        self.give_weights()

    def _due_of(self, x: Tensor) -> Tensor:
        """Returns the samples of the chunks that are due."""
        per_chunk = x.chunk(len(self._chunks))
        return torch.cat([per_chunk[index] for index in self._due])

    @torch.no_grad()
    def give_weights(self) -> None:
        """Gives the layers the weights of the cores that the run keeps."""
        adapter, cores_BMDA = self._adapter, self._run.cores(self._chunks)
        adapter.layers.give(
            adapter.generator.weights(cores_BMDA, adapter.strength, self._place, self._strengths_M)
        )

    def store(self) -> None:
        """Keeps what a whole generation made in the run."""
        if self._unstored is not None:
            self._store(self._unstored)

    def _store(self, cores_BMDA: Tensor) -> None:
        for index, cores_RMDA in zip(self._due, cores_BMDA.chunk(len(self._due)), strict=True):
            self._run.write(self._chunks[index], cores_RMDA, self._time)


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
