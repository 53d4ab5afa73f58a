"""Work in threads whose results come in order."""

from __future__ import annotations

import _thread
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class _Done(Generic[Out]):
    value: Out


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class Threads(AbstractContextManager["Threads"]):
    """Threads that work on items inside a `with` block; what they have begun is finished when it ends.

    Ctrl-C may end the block at any point. `concurrent.futures` then hangs now and then: its locks are
    Python objects, an exception of a signal handler inside `Condition.__enter__` leaves one closed, and the
    end of the process waits for the threads behind it. Here all waiting is in `SimpleQueue`, which is C.

    Args:
        count: of the threads.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._started = 0
        self._stopped = False
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()

    def __enter__(self) -> Threads:
        for _ in range(self._count):
            _thread.start_new_thread(self._work, ())  # `Thread.start` waits in a lock of Python
            self._started += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        for _ in range(self._started):
            self._jobs.put(None)
        for _ in range(self._started):
            self._ended.get()

    def in_order(
        self, function: Callable[[In], Out], items: Iterable[In], *, ahead: int
    ) -> Iterator[tuple[In, Out]]:
        """Yields items with their results, in order; at most `ahead` items are read before theirs is due.

        Raises what the function raises, when its item is due.
        """
        waiting: deque[tuple[In, SimpleQueue[_Done[Out] | _Failed]]] = deque()
        for item in items:
            waiting.append((item, self._submit(function, item)))
            if len(waiting) > ahead:
                item, result = waiting.popleft()
                yield item, _value(result.get())
        while waiting:
            item, result = waiting.popleft()
            yield item, _value(result.get())

    def _submit(self, function: Callable[[In], Out], item: In) -> SimpleQueue[_Done[Out] | _Failed]:
        result: SimpleQueue[_Done[Out] | _Failed] = SimpleQueue()

        def job() -> None:
            try:
                result.put(_Done(function(item)))
            except BaseException as error:  # noqa: BLE001 (raised again where the result is due)
                result.put(_Failed(error))

        self._jobs.put(job)
        return result

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._stopped:
                job()
        self._ended.put(None)


def _value(result: _Done[Out] | _Failed) -> Out:
    if isinstance(result, _Failed):
        raise result.error
    return result.value
