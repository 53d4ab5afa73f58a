"""A progress bar: tqdm's where it is installed, plain lines elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from typing import Protocol, cast

SECONDS_BETWEEN_LINES = 5.0


class Bar(Protocol):
    """What a progress bar can do."""

    def update(self, n: int) -> object:
        """Counts images."""
        ...

    def close(self) -> object:
        """Ends the bar."""
        ...


class Lines:
    """A line on standard error every few seconds."""

    def __init__(self, total: int, what: str, done: int) -> None:
        self._total, self._what, self._done, self._first = total, what, done, done
        self._start = self._last = time.monotonic()

    def update(self, n: int) -> None:
        """Counts images, and says so now and then."""
        self._done += n
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            rate = (self._done - self._first) / (now - self._start)
            sys.stderr.write(f"{self._what}: {self._done} of {self._total} ({rate:.1f}/s)\n")

    def close(self) -> None:
        """Says how many there were."""
        sys.stderr.write(f"{self._what}: {self._done} of {self._total}\n")


def bar(total: int, what: str, done: int = 0) -> Bar:
    """Returns a bar in the terminal that starts at `done`."""
    if importlib.util.find_spec("tqdm") is None:
        return Lines(total, what, done)
    tqdm = importlib.import_module("tqdm").tqdm
    return cast("Bar", tqdm(total=total, initial=done, desc=what, unit="image", smoothing=0.05))
