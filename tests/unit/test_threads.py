"""Work in threads whose results come in order."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyperalign.threads import Threads

ROOT = Path(__file__).parents[2]

SIGNALLED = """
import signal
from hyperalign.threads import Threads

class Stop(Exception):
    pass

def stop(number, frame):
    raise Stop

signal.signal(signal.SIGALRM, stop)
for turn in range(400):
    try:
        with Threads(4) as threads:
            signal.setitimer(signal.ITIMER_REAL, 1e-3 + 7e-6 * turn)
            for _ in threads.in_order(abs, range(10**9), ahead=8):
                pass
    except Stop:
        print("stopped")
"""


def test_results_come_in_the_order_of_the_items_whoever_is_first() -> None:
    def late_if_even(number: int) -> int:
        time.sleep(0.02 * (number % 2 == 0))
        return -number

    with Threads(3) as threads:
        assert list(threads.in_order(late_if_even, range(9), ahead=4)) == [(n, -n) for n in range(9)]


def test_no_more_items_than_asked_for_are_read_ahead() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            read.append(number)
            yield number

    with Threads(2) as threads:
        for done, _ in threads.in_order(abs, items(), ahead=3):
            assert len(read) <= done + 4


def test_an_items_error_is_raised_in_its_turn_and_later_items_are_not_begun() -> None:
    begun: list[int] = []

    def fails_at_two(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise ValueError("two")
        return number

    results: list[int] = []
    with pytest.raises(ValueError, match="two"), Threads(1) as threads:
        results.extend(result for _, result in threads.in_order(fails_at_two, range(100), ahead=1))
    assert results == [0, 1]
    assert max(begun) <= 4


def test_the_threads_have_ended_their_work_when_the_block_ends() -> None:
    working = threading.Event()
    finished: list[int] = []

    def work(number: int) -> None:
        working.set()
        time.sleep(0.1)
        finished.append(number)

    with pytest.raises(KeyError), Threads(1) as threads:
        for _ in threads.in_order(work, range(5), ahead=4):
            raise KeyError
    assert working.is_set()
    count = len(finished)
    time.sleep(0.2)
    assert len(finished) == count < 5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no interval timers")
def test_a_signals_exception_never_leaves_the_threads_waiting_for_each_other() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SIGNALLED], cwd=ROOT, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("stopped") == 400
