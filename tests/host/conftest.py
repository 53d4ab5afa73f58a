"""A real ComfyUI for the tests: its source tree in this process, and one running server for all tests."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from hyperalign.cli.sample.client import ComfyClient
from scripts.environment import venv_python
from scripts.host import Server
from scripts.host_tree import comfyui_tree


class RunningHost(NamedTuple):
    """A started server with a client that talks to it."""

    server: Server
    client: ComfyClient
    url: str


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI source tree."""
    return comfyui_tree(venv_python() if venv_python().exists() else Path(sys.executable))


@pytest.fixture(scope="session")
def server(comfyui_path: Path, worker_id: str) -> Iterator[RunningHost]:
    """One server with this pack installed, for the whole session of one of pytest-xdist's workers."""
    # pytest tears fixtures down on KeyboardInterrupt, but dies at once of SIGTERM.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Server(comfyui_path, f"tests-{worker_id}") as running:
        yield RunningHost(running, ComfyClient(running.url), running.url)
