"""What one run of a sampler keeps: shared by the threads of that run, and by nothing else. No host inside."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..generation import Generator
from ..layers import AdaptedLayers
from ..run_state import Chunk, Run, Time
from ..tracing import TracedRun
from ..weights import Place

_TURNS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_TURNS_GUARD = threading.Lock()


@contextlib.contextmanager
def turn(base: nn.Module) -> Iterator[None]:
    """Waits until no other thread has a base model's layers adapted."""
    with _TURNS_GUARD:
        lock = _TURNS.setdefault(base, threading.RLock())
    with lock:
        yield


class AdaptedModel:
    """One copy of the base model in a run, with the layers and the weights that only it has."""

    def __init__(self, base: nn.Module, layers: AdaptedLayers, generator: Generator) -> None:
        self.layers, self.generator = layers, generator
        self.modules = [base.get_submodule(path) for path in layers.paths]
        """Of each adapted layer."""


class Sampling:
    """One run: what was generated, and the copies of the base model that it is generated for.

    The host's multi-GPU nodes call copies of one model from threads of their own.
    """

    def __init__(self, run: Run, adapt: Callable[[nn.Module], AdaptedModel]) -> None:
        self.run = run
        self.lock = threading.RLock()
        """Held by who reads or writes the run."""
        self._adapt = adapt
        self._models: dict[nn.Module, AdaptedModel] = {}

    def model(self, base: nn.Module) -> AdaptedModel:
        """Returns a base model with its adapted layers."""
        with self.lock:
            if base not in self._models:
                self._models[base] = self._adapt(base)
            return self._models[base]

    @property
    def has_acted(self) -> bool:
        """Whether a call was to be adapted: none is outside of a window, or where a strength is 0."""
        return bool(self._models)

    @property
    def targets_reached(self) -> int:
        """How many targets' layers ran, on the copy on which the fewest did."""
        return min((model.layers.targets_reached for model in self._models.values()), default=0)

    @contextlib.contextmanager
    def trial(self, rows: int) -> Iterator[None]:
        """Inside, calls evaluate variations of the run's single sample, which leave nothing in the run."""
        run, self.run = self.run, self.run.variations(rows)
        try:
            yield
        finally:
            self.run = run

    def close(self) -> None:
        """Frees all memory."""
        for model in self._models.values():
            model.layers.reset()
            model.generator.end_run()
        self._models.clear()


@contextlib.contextmanager
def trials(options: Mapping[str, Any], rows: int) -> Iterator[None]:
    """Inside, the runs in a guider's transformer_options evaluate latents that may be rejected."""
    with contextlib.ExitStack() as stack:
        for value in options.values():
            if isinstance(value, Sampling):
                stack.enter_context(value.trial(rows))
        yield


class Call:
    """One call of a model in a run: which weights it generates, and which it reuses."""

    def __init__(
        self,
        sampling: Sampling,
        model: AdaptedModel,
        chunks: Sequence[Chunk],
        time: Time,
        text_BLC: Tensor,
        strength: float,
        strengths_M: Tensor | None,
        place: Place,
    ) -> None:
        """Enters the run.

        Args:
            sampling: the run.
            model: the copy of the base model that is called.
            chunks: the conditionings whose samples follow one after the other.
            time: of the call.
            text_BLC: the samples' text tokens.
            strength: of the change.
            strengths_M: a factor on each target's strength.
            place: where the weights go.
        """
        self._sampling, self._model, self._time = sampling, model, time
        self._text_BLC, self._place = text_BLC, place
        self._strength, self._strengths_M = strength, strengths_M
        with sampling.lock:
            self._chunks = sampling.run.enter_call(chunks, time)
            self.due = sampling.run.due(self._chunks, time)
            if isinstance(sampling.run, TracedRun):
                sampling.run.note_strengths(strengths_M)
        self._generates_all = len(self.due) == len(self._chunks)
        self._unstored: Tensor | None = None

    @torch.no_grad()
    def generate(self, features: Sequence[Tensor]) -> None:
        """Generates the cores of the chunks that are due, and gives the layers their weights.

        Where all chunks are due this may be a part of a compiled graph, which leaves the run's state alone.
        """
        generator = self._model.generator
        if self._generates_all:
            self._unstored, weights = generator.generate(
                features, self._text_BLC, self._strength, self._place, self._strengths_M
            )
            self._model.layers.give(weights)
            return
        selected = [self._due_of(feature) for feature in features]
        self._store(generator.cores(selected, self._due_of(self._text_BLC)))
        self.give_weights()

    def _due_of(self, x: Tensor) -> Tensor:
        """Returns the samples of the chunks that are due."""
        per_chunk = x.chunk(len(self._chunks))
        return torch.cat([per_chunk[index] for index in self.due])

    @torch.no_grad()
    def give_weights(self) -> None:
        """Gives the layers the weights of the cores that the run keeps."""
        with self._sampling.lock:
            cores_BMDA = self._sampling.run.cores(self._chunks)
        self._model.layers.give(
            self._model.generator.weights(cores_BMDA, self._strength, self._place, self._strengths_M)
        )

    def store(self) -> None:
        """Keeps what a whole generation made in the run."""
        if self._unstored is not None:
            self._store(self._unstored)

    def _store(self, cores_BMDA: Tensor) -> None:
        with self._sampling.lock:
            for index, cores_RMDA in zip(self.due, cores_BMDA.chunk(len(self.due)), strict=True):
                self._sampling.run.write(self._chunks[index], cores_RMDA, self._time)
