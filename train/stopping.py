"""Requests to stop a run: SIGTERM, as cluster schedulers send it before they take a node, or Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

logger = logging.getLogger("hyperalign.train")


class Stopped(Exception):
    """The run was asked to stop; its training checkpoint is saved."""


class StopRequest:
    """Whether the run was asked to stop.

    A request waits for the end of the step; Ctrl-C after it raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.received = False
        self._immediate = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles both signals inside the block, in the main thread: Python delivers them to no other."""
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
        """Raises Stopped inside the block as soon as a request comes: for work that can be repeated."""
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
        logger.warning("The run stops after this step; Ctrl-C now stops it at once, without that step.")
