"""How OpenMP's threads wait for each other. Imports no torch, which reads the setting when it is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The variables of the OpenMP runtimes that decide how threads wait."""


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes OpenMP's threads sleep while they wait, unless the environment already sets how they wait.

    By default they spin at every barrier. Beside another busy process a thread then waits actively for one
    that has no core, and small operations become many times slower (`benchmarks/openmp.py`).

    Args:
        environment: of a process to be started, or of this one, before it imports torch.
    """
    if not any(name in environment for name in WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
