"""Work in threads whose results come in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[In], Out], items: Iterable[In], ahead: int
) -> Iterator[tuple[In, Out]]:
    """Yields items with their results, in order; at most `ahead` of them are in progress.

    `ThreadPoolExecutor.map` would read all items at once.
    """
    waiting: deque[tuple[In, Future[Out]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > ahead:
                item, future = waiting.popleft()
                yield item, future.result()
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
