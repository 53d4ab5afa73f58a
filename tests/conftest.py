"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("fuzz", max_examples=5_000, deadline=None)  # minutes: tests/unit/fuzz


@pytest.fixture(scope="session")
def recomputed() -> Callable[[Any], Any]:
    """Numbers that a network computes twice in batches of other sizes.

    Kernels then sum in another order, which processors do differently: single precision keeps about seven
    digits, of which a network's depth costs two.
    """
    return lambda expected: pytest.approx(expected, rel=1e-5, abs=1e-5)
