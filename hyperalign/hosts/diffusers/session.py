"""HyperAlign on diffusers' pipelines, U-Nets and transformers: `attach` aligns one until it is detached."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ...checkpoint import HyperAlign, load
from ...errors import HyperAlignError
from ...schedule import Schedule, Variant
from ..forwards import owners, replace_forward, restore_forward
from ..merging import MERGINGS, Merging
from ..run_state import Chunk, Run, Time
from .adapter import Adapter, Call, check_projections, latents_argument

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LOG = logging.getLogger(__name__)

ZEROS = (
    'The pipeline guides away from zeros in place of an empty prompt. Pass negative_prompt="" to encode it: '
    "hypernetworks are trained with the encoded empty prompt, as ComfyUI samples."
)
"""SDXL's pipelines do so without a negative prompt (`force_zeros_for_empty_prompt`)."""


class Session:
    """An attached base model: the weights of its run, and how to detach from it.

    Also a context manager that detaches at its end. The hypernetwork follows the device of its inputs
    and keeps its own precision, float32 as loaded.
    """

    def __init__(
        self, adapter: Adapter, schedule: Schedule, strength: float, pipeline: DiffusionPipeline | None = None
    ) -> None:
        """Replaces the base model's forward, and a session that was there before."""
        self.adapter = adapter
        self.schedule = schedule
        self.strength = strength
        self._pipeline: Any = pipeline
        self._timesteps: Tensor | None = None
        self._u = 0.0
        self._values: list[float] = []
        self._inside = False
        self.new_run()
        for earlier in owners(adapter.base):
            if isinstance(earlier, Session):
                earlier.detach()
        self._original = replace_forward(adapter.base, self.forward)
        self._signature = inspect.signature(self._original)
        self._attached = True

    @property
    def evaluations(self) -> int:
        """Model evaluations of the current or last run."""
        return self._run.evaluations

    @property
    def generations(self) -> int:
        """Evaluations of the current or last run at which weights were generated."""
        return self._run.generations

    def new_run(self) -> None:
        """Forgets the current weights. Runs of a pipeline are recognised without it.

        Raises:
            HyperAlignError: the base model's attention projections are fused.
        """
        check_projections(self.adapter.base)
        self.adapter.begin_run()
        self._run = Run(self.schedule)
        self._contexts: list[Tensor] = []

    def predict(self, call: Call) -> Tensor:
        """Returns the adapted prediction, generating weights when they are due."""
        time = Time(lambda: self.adapter.time(self.on_host(call)).u)
        x = call[latents_argument(self.adapter.base)]
        self._begin_run_if_new(time)
        if next(self.adapter.network.parameters()).device != x.device:
            self.adapter.network.to(x.device)
        source = self._conditioning(call["encoder_hidden_states"])
        return self.adapter.predict(self._run, Chunk(source, 0, tuple(x.shape)), call, time, self.strength)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the base model's forward."""
        if self._inside or not self._attached or self.strength == 0.0:
            return self._original(*args, **kwargs)
        call = dict(self._signature.bind(*args, **kwargs).arguments)
        wants_output = call.pop("return_dict", True)
        self._inside = True
        try:
            prediction = self.predict(call)
        finally:
            self._inside = False
        return Transformer2DModelOutput(sample=prediction) if wants_output else (prediction,)

    def detach(self) -> None:
        """Restores the base model; a second call does nothing."""
        self._attached = False
        self.adapter.end_run()
        restore_forward(self.adapter.base, self.forward, self._original)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _begin_run_if_new(self, time: Time) -> None:
        """Drops the weights of the last run at the first evaluation of another.

        Every call of a pipeline begins with `set_timesteps`, which makes a new tensor, so a run is known
        by the identity of its scheduler's timesteps: also after an interrupted run, with one step a run,
        and when the scheduler was exchanged. Nothing of the pipeline is wrapped that would have to be
        restored. A base model without a pipeline starts anew when the time rises.
        """
        timesteps = None if self._pipeline is None else self._pipeline.scheduler.timesteps
        if timesteps is not self._timesteps or (timesteps is None and time.u > self._u):
            self.new_run()
        if timesteps is None:
            self._u = time.u
        if timesteps is not self._timesteps:
            self._timesteps, self._values = timesteps, []

    def on_host(self, call: Call) -> Call:
        """Returns a call whose timestep is on the host, where it is one of the scheduler's own.

        Those are read together once a run: each single look at the device would wait for it.
        """
        t, all_T = call["timestep"], self._timesteps
        if all_T is None or not isinstance(t, Tensor) or t.device.type == "cpu":
            return call
        if t.untyped_storage().data_ptr() != all_T.untyped_storage().data_ptr():
            return call
        if not self._values:
            self._values = all_T.tolist()
        return {"timestep": self._values[(t.storage_offset() - all_T.storage_offset()) // all_T.stride(0)]}

    def _conditioning(self, context_BLC: Tensor) -> int:
        """Returns a number for the samples' prompts: true CFG and skipped-layer guidance call once for each.

        Pipelines hand over the same tensor at every step, so that contents are rarely compared.
        """
        for number, known in enumerate(self._contexts):
            if known is context_BLC or (known.shape == context_BLC.shape and torch.equal(known, context_BLC)):
                return number
        if self._pipeline is not None and not bool(context_BLC.flatten(1).any(dim=1).all()):
            LOG.warning(ZEROS)
        self._contexts.append(context_BLC)
        return len(self._contexts) - 1


def attach(
    target: DiffusionPipeline | nn.Module,
    hyperalign: HyperAlign | Path | str,
    strength: float = 1.0,
    variant: Variant | Literal["auto"] = "auto",
    merging: Merging = "auto",
    capture: bool = False,
) -> Session:
    """Aligns a pipeline until `detach()`, or inside a `with` block; attaching again replaces.

    Args:
        target: a StableDiffusion, StableDiffusionXL, StableDiffusion3 or Flux pipeline, or its U-Net or
            transformer alone; no weight is touched.
        hyperalign: a hypernetwork's file, or what `hyperalign.checkpoint.load` returned.
        strength: 0 is the base model bit for bit, 1 as trained.
        variant: S, P or I; `auto` takes the one the hypernetwork was trained for.
        merging: `merged` gives each sample its own copy of the adapted layers' weights, with the change in
            them: a layer then takes as long as without HyperAlign, and more memory. `additive` adds the
            change to the layers' outputs. `auto` chooses; where weights cannot be merged, they are added.
        capture: replays the generations of variant S as a CUDA graph, where that is possible.

    Returns:
        The session: `detach()`, and `evaluations` and `generations` of the last run.

    Raises:
        HyperAlignError: another base model, one whose attention projections are fused, a file that is no
            hypernetwork, or P without key times.
    """
    if not math.isfinite(strength):
        raise HyperAlignError(f"strength is {strength}; expected a number, 0 for off and 1 as trained.")
    if merging not in MERGINGS:
        raise HyperAlignError(f"merging is {merging!r}; expected one of {', '.join(MERGINGS)}.")
    loaded = hyperalign if isinstance(hyperalign, HyperAlign) else load(Path(hyperalign))
    schedule = loaded.header.schedule
    if variant != "auto":
        schedule = Schedule(variant, schedule.key_times)
    pipeline = None if isinstance(target, nn.Module) else target
    return Session(
        Adapter(denoiser_of(target), loaded, schedule, merging, capture), schedule, strength, pipeline
    )


def denoiser_of(target: DiffusionPipeline | nn.Module) -> nn.Module:
    """Returns a pipeline's transformer or U-Net. Raises HyperAlignError if it has none."""
    if isinstance(target, nn.Module):
        return target
    parts: Mapping[str, Any] = getattr(target, "components", {})
    for name in ("transformer", "unet"):
        if isinstance(part := parts.get(name), nn.Module):
            return part
    raise HyperAlignError(
        f"HyperAlign was given a {type(target).__name__} without transformer or unet; expected a diffusers "
        "pipeline such as StableDiffusionPipeline, or its unet or transformer. Pass one of those."
    )
