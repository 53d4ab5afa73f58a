"""What one sampling run remembers: evaluations, and whose weights were generated when. No host inside.

Hosts split a model evaluation into calls and calls into chunks (cond, uncond, regions), one chunk
being the whole batch for one conditioning. Weights of variants I and P outlive a call, so they are
kept under the identity of their chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..schedule import Schedule


class Time:
    """The time u of a call, which is read only if something asks: a GPU has to be waited for."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read

    @functools.cached_property
    def u(self) -> float:
        """The time in [0, 1], 1 being pure noise."""
        return self._read()

    def __float__(self) -> float:
        return self.u


def time_of(u: float | Time) -> Time:
    """Returns a time that may be known already."""
    return u if isinstance(u, Time) else Time(lambda: u)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The identity of one conditioning's rows, stable over the evaluations of a run."""

    source: Hashable
    """What the host calls this conditioning."""
    role: int
    """The host's index of the prediction it belongs to; two roles may share a source."""
    shape: tuple[int, ...]
    """Shape of its latents; a region of another size needs weights of its own."""
    occurrence: int = 0
    """How often it was seen before in the same evaluation (tiles, context windows, PAG)."""


@dataclass(frozen=True, slots=True)
class _Written:
    cores_RMDA: Tensor
    segment: int


@dataclass(slots=True)
class Run:
    """State of one sampling run; dropped with the run."""

    schedule: Schedule
    evaluations: int = 0
    generations: int = 0
    _written: dict[Chunk, _Written] = field(default_factory=dict[Chunk, _Written])
    _seen: dict[Chunk, int] = field(default_factory=dict[Chunk, int])
    _joined: tuple[tuple[Chunk, ...], Tensor] | None = None
    _time: Time | None = None
    _declared: bool = False
    _generated: bool = False

    def begin_evaluation(self, declared: bool = True) -> None:
        """Opens an evaluation; `declared` False when it had to be guessed from the calls."""
        self.evaluations += 1
        self._seen.clear()
        self._declared = declared
        self._generated = False

    def end_evaluation(self) -> None:
        """Closes an evaluation; calls after it open one of their own."""
        self._declared = False
        self._time = None

    def enter_call(self, chunks: Sequence[Chunk], u: float | Time) -> list[Chunk]:
        """Returns the call's chunks with their occurrence counted.

        Some guiders never declare evaluations; outside a declared one, a new one starts when the
        time changes or a chunk comes round again.
        """
        time, last = time_of(u), self._time
        if not self._declared and (
            last is None or any(chunk in self._seen for chunk in chunks) or last.u != time.u
        ):
            self.begin_evaluation(declared=False)
        self._time = time
        return [self._count(chunk) for chunk in chunks]

    def due(self, chunks: Sequence[Chunk], u: float | Time) -> list[int]:
        """Returns the indices of the chunks that need weights generated at time u."""
        time = time_of(u)
        return [index for index, chunk in enumerate(chunks) if self._is_due(self._written.get(chunk), time)]

    def _is_due(self, written: _Written | None, time: Time) -> bool:
        if written is None or self.schedule.variant == "S":
            return True
        if written.segment == self.schedule.last_segment:
            return False
        return self.schedule.is_due(time.u, written.segment)

    def write(self, chunk: Chunk, cores_RMDA: Tensor, u: float | Time) -> None:
        """Keeps the cores of a chunk's R rows; an evaluation counts as one generation at most."""
        self.generations += not self._generated
        self._generated = True
        segment = self.schedule.segment(time_of(u).u) if self.schedule.last_segment else 0
        self._written[chunk] = _Written(cores_RMDA, segment)
        self._joined = None

    def share(self, chunk: Chunk, known: Chunk, rows: Sequence[int]) -> None:
        """Gives a chunk the cores of some rows of another: a part of its samples goes on alone."""
        if (written := self._written.get(known)) is not None:
            self._written[chunk] = _Written(written.cores_RMDA[list(rows)], written.segment)

    def variations(self, rows: int) -> Run:
        """Returns a run of so many variations of this one's single sample; it begins with its weights."""
        written = {
            replace(chunk, shape=(rows, *chunk.shape[1:])): replace(
                known, cores_RMDA=known.cores_RMDA[[0] * rows]
            )
            for chunk, known in self._written.items()
        }
        return Run(self.schedule, _written=written)

    def cores(self, chunks: Sequence[Chunk]) -> Tensor:
        """Returns the cores (B, M, b, a) of all rows of a call. All chunks must have been written.

        The same tensor as long as nothing is written and the same chunks come, so that what is made
        from it can be kept.
        """
        key = tuple(chunks)
        if self._joined is None or self._joined[0] != key:
            cores = [self._written[chunk].cores_RMDA for chunk in chunks]
            self._joined = (key, cores[0] if len(cores) == 1 else torch.cat(cores))
        return self._joined[1]

    def _count(self, chunk: Chunk) -> Chunk:
        occurrence = self._seen.get(chunk, 0)
        self._seen[chunk] = occurrence + 1
        return Chunk(chunk.source, chunk.role, chunk.shape, occurrence)
