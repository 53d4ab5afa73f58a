"""HyperAlign on diffusers' pipelines, U-Nets and transformers: `attach` aligns one until it is detached."""

from __future__ import annotations

import inspect
import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ...checkpoint import HyperAlign, load
from ...errors import HyperAlignError
from ...schedule import Schedule, Variant
from ..forwards import owners, replace_forward, restore_forward
from ..merging import MERGINGS, Merging
from .adapter import Adapter, Call, latents_argument
from .checks import check_model
from .runs import Runs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LOG = logging.getLogger(__name__)

ZEROS = (
    'The pipeline guides away from zeros in place of an empty prompt. Pass negative_prompt="" to encode it: '
    "hypernetworks are trained with the encoded empty prompt, as ComfyUI samples."
)
"""SDXL's pipelines do so without a negative prompt (`force_zeros_for_empty_prompt`)."""

BYPASSED = (
    "HyperAlign reached only %d of %d layers in an evaluation: a cache, an attention processor or another "
    "patch bypasses them. Remove it, such as by disable_cache(), or update HyperAlign."
)


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
        self._lock = threading.RLock()
        """Of an evaluation: layers have the weights of one at a time."""
        self._is_whole = True
        """Whether all layers ran in each evaluation of the current run."""
        self._runs = Runs(schedule, adapter.time, self._begin_run, pipeline)
        for earlier in owners(adapter.base):
            if isinstance(earlier, Session):
                earlier.detach()
        self._original = replace_forward(adapter.base, self.forward)
        adapter.run_base = self._original
        self._signature = inspect.signature(self._original)
        self._attached = True

    @property
    def evaluations(self) -> int:
        """Model evaluations of the current or last run."""
        return self._runs.current.run.evaluations

    @property
    def generations(self) -> int:
        """Evaluations of the current or last run at which weights were generated."""
        return self._runs.current.run.generations

    def new_run(self) -> None:
        """Forgets the current weights. Runs of pipelines are recognised without it.

        Raises:
            HyperAlignError: the base model runs as it cannot be aligned, such as with fused projections.
        """
        with self._lock:
            self._runs.open()

    def predict(self, call: Call) -> Tensor:
        """Returns the adapted prediction, generating weights when they are due."""
        x, context_BLC = call[latents_argument(self.adapter.base)], call["encoder_hidden_states"]
        current, time = self._runs.enter(call)
        if next(self.adapter.network.parameters()).device != x.device:
            self.adapter.network.to(x.device)
        chunk, is_new = current.chunk(context_BLC, tuple(x.shape))
        if is_new and current.is_pipelines and not bool(context_BLC.flatten(1).any(dim=1).all()):
            LOG.warning(ZEROS)
        prediction = self.adapter.predict(current.run, chunk, call, time, self.strength)
        if not call.get("skip_layers"):  # skipped-layer guidance leaves out what it was asked to
            self._report(self.adapter.targets_reached)
        return prediction

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the base model's forward."""
        if not self._attached or self.strength == 0.0:
            return self._original(*args, **kwargs)
        call = dict(self._signature.bind(*args, **kwargs).arguments)
        wants_output = call.pop("return_dict", True)
        with self._lock:
            prediction = self.predict(call)
        return Transformer2DModelOutput(sample=prediction) if wants_output else (prediction,)

    def detach(self) -> None:
        """Restores the base model; a second call does nothing."""
        self._attached = False
        with self._lock:
            self.adapter.end_run()
        restore_forward(self.adapter.base, self.forward, self._original)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _begin_run(self) -> None:
        check_model(self.adapter.base, self.adapter.header.mode)
        self.adapter.begin_run()
        self._is_whole = True

    def _report(self, reached: int) -> None:
        """Warns once a run of an evaluation in which adapted layers did not run."""
        targets = len(self.adapter.network.targets)
        if self._is_whole and reached < targets:
            self._is_whole = False
            LOG.warning(BYPASSED, reached, targets)


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
