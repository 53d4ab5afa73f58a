"""Records what a hypernetwork writes during sampling. No host inside.

While a run lasts only references to its tensors are kept; they are copied to the CPU when it ends, and
nothing is computed before somebody asks for the trace.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import HyperAlignError
from ..hypernetwork import HyperNetwork
from ..schedule import Schedule
from ..trace import Trace, Track, coordinates
from .run_state import Chunk, Run, Time

KEPT_BYTES = 256 << 20
"""What a recorder holds of past runs; the last one is always kept. 40 runs of variant S on SD 1.5."""


class TracedRun(Run):
    """A run that remembers all it wrote."""

    def __init__(self, schedule: Schedule, keeps_predictions: bool) -> None:
        super().__init__(schedule)
        self.keeps_predictions = keeps_predictions
        self.times: list[float | Time | Tensor] = []
        self.strengths: list[Tensor | None] = []
        self.written: dict[Chunk, list[tuple[int, Tensor]]] = {}
        self.served: dict[Chunk, set[int]] = {}
        self.predictions: list[Tensor] = []

    def begin_evaluation(self, declared: bool = True) -> None:
        """Also makes room for what this evaluation does."""
        super().begin_evaluation(declared)
        self.times.append(math.nan)
        self.strengths.append(None)

    def enter_call(self, chunks: Sequence[Chunk], u: float | Time) -> list[Chunk]:
        """Also remembers which conditionings the weights serve, and when."""
        counted = super().enter_call(chunks, u)
        self.times[-1] = u
        for chunk in counted:
            self.served.setdefault(chunk, set()).add(self.evaluations - 1)
        return counted

    def write(self, chunk: Chunk, cores_RMDA: Tensor, u: float | Time) -> None:
        """Also remembers the weights."""
        super().write(chunk, cores_RMDA, u)
        self.written.setdefault(chunk, []).append((self.evaluations - 1, cores_RMDA.detach()))

    def note_time(self, u: Tensor) -> None:
        """Takes an evaluation's time, which is not read before the run ends; its calls may tell it too."""
        self.times[-1] = u

    def note_strengths(self, factors_M: Tensor | None) -> None:
        """Takes the factors on each target's strength in the current evaluation; None for 1."""
        self.strengths[-1] = factors_M

    def note_prediction(self, latents_BCHW: Tensor) -> None:
        """Takes an evaluation's guided one-step prediction, which must not be changed any more."""
        self.predictions.append(latents_BCHW)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """One conditioning's raw cores."""

    role: int
    cores_GRMDA: Tensor
    written: tuple[int, ...]
    in_force: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """One finished run on the CPU."""

    network: HyperNetwork
    strength: float
    schedule: Schedule
    times: tuple[float, ...]
    factors_EM: Tensor
    stretches: tuple[_Stretch, ...]
    predictions_EBCHW: Tensor | None
    samples_BCHW: Tensor | None
    """What the run sampled, by which it is found again."""

    @property
    def bytes(self) -> int:
        """Its size."""
        tensors = [stretch.cores_GRMDA for stretch in self.stretches]
        tensors += [self.predictions_EBCHW] if self.predictions_EBCHW is not None else []
        return sum(tensor.nbytes for tensor in tensors)

    def is_of(self, samples_BCHW: Tensor) -> bool:
        """Returns whether these latents are what the run sampled."""
        own = self.samples_BCHW
        if own is None or own.shape != samples_BCHW.shape:
            return False
        return torch.equal(own.to(samples_BCHW.dtype), samples_BCHW.cpu())

    def trace(self) -> Trace:
        """Computes the trace."""
        network = self.network
        aux = [network.aux(index) for index in range(len(network.targets))]
        a_aux, b_aux = [a.cpu() for a, _ in aux], [b.cpu() for _, b in aux]
        tracks = tuple(
            Track(part.role, coordinates(part.cores_GRMDA, a_aux, b_aux), part.written, part.in_force)
            for part in self.stretches
        )
        names = tuple(target.name for target in network.targets)
        return Trace(
            self.schedule.variant, self.schedule.key_times, names, self.times,
            self.strength * self.factors_EM, tracks, self.predictions_EBCHW,
        )  # fmt: skip


@dataclass(slots=True)
class Recorder:
    """What a traced MODEL fills whenever a sampler runs it."""

    keeps_predictions: bool = False
    recordings: list[Recording] = field(default_factory=list[Recording])
    """The last runs, the newest at the end."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def open(self, schedule: Schedule) -> TracedRun:
        """Returns the state of a new run."""
        return TracedRun(schedule, self.keeps_predictions)

    def keep(self, run: TracedRun, network: HyperNetwork, strength: float, samples: object) -> None:
        """Keeps a finished run that generated weights, and lets go of the oldest where they grow too many."""
        if not run.written:
            return
        recording = _recording(run, network, strength, samples)
        with self._lock:
            self.recordings.append(recording)
            while len(self.recordings) > 1 and sum(kept.bytes for kept in self.recordings) > KEPT_BYTES:
                del self.recordings[0]

    def select(self, samples_BCHW: Tensor | None = None) -> Recording:
        """Returns the run that sampled these latents, or else the last one.

        Raises HyperAlignError if nothing was recorded.
        """
        if not self.recordings:
            raise HyperAlignError(
                "The trace is empty: no sampler has run with this MODEL yet, or it was off (strength 0, "
                "or replaced by a second Apply HyperAlign). Connect the sampler's LATENT to latent: then "
                "the trace is read after sampling. If the LATENT came out of the cache, change the seed."
            )
        found = [] if samples_BCHW is None else [r for r in self.recordings if r.is_of(samples_BCHW)]
        return found[-1] if found else self.recordings[-1]


def _recording(run: TracedRun, network: HyperNetwork, strength: float, samples: object) -> Recording:
    count, targets = len(run.times), len(network.targets)
    factors = [torch.ones(targets) if item is None else item.float().cpu() for item in run.strengths]
    predictions = run.predictions
    are_whole = len(predictions) == count and len({x_BCHW.shape for x_BCHW in predictions}) == 1
    return Recording(
        network=network,
        strength=strength,
        schedule=run.schedule,
        times=tuple(float(time) for time in run.times),
        factors_EM=torch.stack(factors),
        stretches=tuple(_stretch(run, chunk, count) for chunk in run.written),
        predictions_EBCHW=torch.stack(predictions).float().cpu() if are_whole else None,
        samples_BCHW=samples.detach().cpu() if isinstance(samples, Tensor) else None,
    )


def _stretch(run: TracedRun, chunk: Chunk, evaluations: int) -> _Stretch:
    written = tuple(evaluation for evaluation, _ in run.written[chunk])
    in_force = tuple(
        sum(at <= evaluation for at in written) - 1 if evaluation in run.served[chunk] else -1
        for evaluation in range(evaluations)
    )
    cores_GRMDA = torch.stack([cores for _, cores in run.written[chunk]]).float().cpu()
    return _Stretch(chunk.role, cores_GRMDA, written, in_force)
