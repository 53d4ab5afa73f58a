"""Which run of which pipeline a model evaluation belongs to."""

from __future__ import annotations

import inspect
import operator
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...schedule import Schedule
from ..run_state import Chunk, Run, Time


@dataclass(slots=True)
class PipelineRun:
    """The state of one run: its weights, prompts and timesteps."""

    run: Run
    last: tuple[int | None, float] | None = None
    """Index and time of the last evaluation in a loop outside of pipelines, the time where there is no index;
    None in a pipeline's run."""
    timesteps: Tensor | None = None
    """Of the attached pipeline's scheduler, during such a loop."""
    _contexts: list[Tensor] = field(default_factory=list[Tensor])
    _values: list[float] = field(default_factory=list[float])

    @property
    def is_pipelines(self) -> bool:
        """Whether a pipeline runs the model, and not a loop of somebody's own."""
        return self.last is None

    def chunk(self, context_BLC: Tensor, shape: tuple[int, ...]) -> tuple[Chunk, bool]:
        """Returns the identity of samples, known by their prompts, and whether these are new.

        True CFG and skipped-layer guidance call once for each prompt. Pipelines hand over the same tensor at
        every step, so that contents are rarely compared. Samples that go on without the others of their
        batch, as where guidance ends, keep their weights.
        """
        for same in (operator.is_, _are_equal):  # contents only where no tensor is the same: that waits
            for number, known in enumerate(self._contexts):
                if same(known, context_BLC):
                    return Chunk(number, 0, shape), False
        chunk = Chunk(len(self._contexts), 0, shape)
        for number, known in enumerate(self._contexts):
            rows = rows_within(context_BLC, known)
            if rows is not None:
                self.run.share(chunk, Chunk(number, 0, (len(known), *shape[1:])), rows)
                break
        self._contexts.append(context_BLC)
        return chunk, True

    def timestep(self, index: int, timesteps: weakref.ref[Tensor]) -> float:
        """Returns one of the run's timesteps from the host.

        They are read together once a run: each single look at the device would wait for it.
        """
        if not self._values:
            self._values = cast(Tensor, timesteps()).tolist()
        return self._values[index]


class Runs:
    """The runs on a base model, whichever pipelines share it; each is known as long as it may go on.

    A pipeline's call makes a new tensor of timesteps, by whose identity the run is known: also with one step
    a run, after an interrupted run, inside of another, and when the scheduler was exchanged. No pipeline is
    changed for it, so nothing has to be restored.
    """

    def __init__(
        self,
        schedule: Schedule,
        time_of: Callable[[Mapping[str, Any]], Time],
        begin: Callable[[], None],
        pipeline: Any = None,
    ) -> None:
        """Begins a run.

        Args:
            schedule: of every run.
            time_of: the time of a call.
            begin: is called at the beginning of each run.
            pipeline: whose scheduler loops outside of pipelines may use.
        """
        self._schedule, self._time_of, self._begin, self._pipeline = schedule, time_of, begin, pipeline
        self._known: Any = WeakTensorKeyDictionary()
        self.current = self._opened()

    def open(self) -> None:
        """Forgets all runs and begins one."""
        self._known.clear()
        self.current = self._opened()

    def enter(self, call: Mapping[str, Any]) -> tuple[PipelineRun, Time]:
        """Returns the run of an evaluation, and its time."""
        timesteps = timesteps_of_caller()
        if timesteps is None:
            return self._enter_loop(call)
        known: PipelineRun | None = self._known.get(timesteps)
        if known is None:
            self._known[timesteps] = known = self._opened()
        self.current = known
        return known, self._time(call, known, timesteps, place_in(timesteps, call["timestep"]))

    def _enter_loop(self, call: Mapping[str, Any]) -> tuple[PipelineRun, Time]:
        """Returns the run and the time of an evaluation outside of pipelines.

        A run begins when the time rises, after a pipeline's run, and when the attached pipeline's scheduler
        has new timesteps. Where the loop goes over these, no time is read for it.
        """
        run = self.current
        timesteps = None if self._pipeline is None else getattr(self._pipeline.scheduler, "timesteps", None)
        index = None if timesteps is None else place_in(timesteps, call["timestep"])
        now = (index, 0.0) if index is not None else (None, self._time_of(call).u)
        if run.last is None or run.timesteps is not timesteps or not _follows(now, run.last):
            run = self._opened()
            run.timesteps = timesteps
        run.last = now
        self.current = run
        return run, self._time(call, run, timesteps, index)

    def _time(
        self, call: Mapping[str, Any], run: PipelineRun, timesteps: Tensor | None, index: int | None
    ) -> Time:
        if timesteps is None or index is None:
            return self._time_of(call)
        # A run keeps its last time: with the timestep in it, the run would keep the tensor it is known by.
        kept = weakref.ref(timesteps)
        return Time(lambda: self._time_of({"timestep": run.timestep(index, kept)}).u)

    def _opened(self) -> PipelineRun:
        self._begin()
        return PipelineRun(Run(self._schedule))


def _follows(now: tuple[int | None, float], last: tuple[int | None, float]) -> bool:
    """Returns whether an evaluation may go on with the run of the last one."""
    if now[0] is None or last[0] is None:
        return now[0] is last[0] and now[1] <= last[1]
    return now[0] >= last[0]


def _timesteps_of_caller() -> Tensor | None:
    """Returns the timesteps of the pipeline's call that is running in this thread; None outside of one.

    They are those over which the call iterates, as another call may have given its scheduler new ones.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__":  # the only frames that are looked into: a look keeps variables
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline):
                own, scheduler = frame.f_locals.get("timesteps"), cast(Any, owner).scheduler
                return own if isinstance(own, Tensor) else scheduler.timesteps
        frame = frame.f_back
    return None


# Frames are not what torch.compile traces.
timesteps_of_caller = cast(Callable[[], Tensor | None], torch.compiler.disable(_timesteps_of_caller))


def place_in(timesteps: Tensor, t: object) -> int | None:
    """Returns which of a scheduler's timesteps a model was given, None if another; looks at no value."""
    if not isinstance(t, Tensor):
        return None
    if t.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (t.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def rows_within(context_BLC: Tensor, known_BLC: Tensor) -> list[int] | None:
    """Returns which rows of a batch of prompts a smaller one consists of, in order; None if of others."""
    if len(context_BLC) >= len(known_BLC) or context_BLC.shape[1:] != known_BLC.shape[1:]:
        return None
    rows: list[int] = []
    for row_LC in context_BLC:
        candidates = range(rows[-1] + 1 if rows else 0, len(known_BLC))
        found = next((index for index in candidates if torch.equal(known_BLC[index], row_LC)), None)
        if found is None:
            return None
        rows.append(found)
    return rows
