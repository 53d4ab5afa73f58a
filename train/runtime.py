"""What happens around a step: states on disk, the log, time left, a request to stop."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from hyperalign.errors import HyperAlignError
from hyperalign.files import replacing, write_text

logger = logging.getLogger("hyperalign.train")
Row = dict[str, Any]
"""One line of the log."""

DAMAGED = (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError)
"""What reading a damaged state raises: its bytes end the unpickler in many ways."""


class SavedStates:
    """The last k states of a run, each written whole or not at all."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: Row, step: int) -> None:
        """Writes a state and removes those beyond the last `keep`. Raises HyperAlignError on a full disk."""
        path = self.folder / f"state-{step:06d}.pt"
        try:
            with replacing(path, durable=True) as partial, partial.open("wb") as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:
            raise HyperAlignError(
                f"The state of step {step} cannot be written to {self.folder} ({error}). Free some space and "
                "run the same command again: it goes on from the state before."
            ) from error
        for old in self._paths()[: -self.keep]:
            old.unlink()

    def newest(self) -> Row | None:
        """Returns the newest state that can be read, None where there is none.

        Raises:
            HyperAlignError: there are states, and none of them can be read.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except DAMAGED as error:
                logger.warning("%s cannot be read (%s); the state before it is taken.", path, error)
        if paths:
            raise HyperAlignError(
                f"None of the {len(paths)} states in {self.folder} can be read. Restore one from a copy, or "
                "delete the folder to begin anew."
            )
        return None

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.pt"))


class Log:
    """log.jsonl: one line a step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate(self, step: int) -> None:
        """Forgets the lines from `step` on, which will be written anew."""
        if step == 0 or not self.path.exists():
            self.path.unlink(missing_ok=True)
            return
        rows = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        steps = [_step_of(row) for row in rows]
        if None in steps:
            logger.warning("%s: %d broken lines are left out.", self.path, steps.count(None))
        kept = [row for row, its in zip(rows, steps, strict=True) if its is not None and its < step]
        write_text(self.path, "".join(row + "\n" for row in kept))

    def append(self, row: Row) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(_rounded(row)) + "\n")


def _step_of(line: str) -> int | None:
    """Returns the step of a line of the log, None where it was not written whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}  # pyright: ignore
    return round(value, 6) if isinstance(value, float) else value


def flat(row: Row, prefix: str = "") -> dict[str, float]:
    """Returns the numbers of a row under slashed names, as trackers take them."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{key}/")  # pyright: ignore
        elif isinstance(value, (int, float)):
            numbers[prefix + key] = float(value)
    return numbers


class Clock:
    """Estimates the time left from the steps of this process; the first one, a warm-up, does not count."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._started: tuple[float, int] | None = None

    def left(self, step: int) -> float | None:
        """Returns the seconds left after `step` steps are done, None after the first."""
        now = time.monotonic()
        if self._started is None:
            self._started = (now, step)
            return None
        start, first = self._started
        return (now - start) / (step - first) * (self.steps - step)


class Stopped(Exception):
    """The run was asked to end; its state is saved."""


class StopRequest:
    """Whether the run was asked to end: by SIGTERM, as schedulers send it before they take a node, or Ctrl-C.

    A request waits for the end of the step; Ctrl-C after it raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.received = False
        self._immediate = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listens inside the block; in threads other than the main one signals cannot be heard."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = [signal.signal(number, self._receive) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Raises Stopped inside the block as soon as a request comes: for work that can be done again."""
        self._immediate = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self._immediate = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            signal.default_int_handler(number, frame)
        self.received = True
        if self._immediate:
            raise Stopped
        logger.warning("The run ends after this step; Ctrl-C now ends it at once, without that step.")
