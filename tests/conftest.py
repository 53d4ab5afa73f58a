"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = ("host", "browser")
"""Folders whose tests share a server, which takes a quarter of a minute to start."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of a file in one of pytest-xdist's processes, and those of a shared server."""
    root = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(root)
        shared = str(place.parent) in SHARED
        item.add_marker(pytest.mark.xdist_group((place.parent if shared else place).as_posix()))


@pytest.fixture(scope="session")
def recomputed() -> Callable[[Any], Any]:
    """Numbers that a network computes twice in batches of other sizes.

    Kernels then sum in another order, which processors do differently: single precision keeps about seven
    digits, of which a network's depth costs two.
    """
    return lambda expected: pytest.approx(expected, rel=1e-5, abs=1e-5)
