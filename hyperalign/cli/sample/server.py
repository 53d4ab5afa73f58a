"""Starts a ComfyUI from its folder and ends it again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType

from ...errors import HyperAlignError

ADDRESS = "127.0.0.1"
START_SECONDS = 300
STOP_SECONDS = 8
TAIL_LINES = 12
PYTHONS = (
    ".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "venv/Scripts/python.exe",
    "../python_embeded/python.exe",
)  # fmt: skip
"""Where a ComfyUI has its own interpreter, the portable one of Windows too."""


class ComfyServer:
    """Runs the ComfyUI of a folder, with its models and packs, between `__enter__` and `__exit__`.

    What it writes goes to a folder that is removed at the end.

    Args:
        tree: the folder of ComfyUI.
        arguments: more of its command-line arguments, as `--cpu`.

    Raises:
        HyperAlignError: the folder is no ComfyUI.
    """

    def __init__(self, tree: Path, arguments: tuple[str, ...] = ()) -> None:
        if not (tree / "main.py").is_file() or not (tree / "comfy").is_dir():
            raise HyperAlignError(f"{tree} is no ComfyUI: it has no main.py and comfy/. Give its folder.")
        self._tree, self._arguments = tree.resolve(), arguments
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> ComfyServer:
        """Starts it and returns when it answers. Raises HyperAlignError with its last lines."""
        self._scratch = tempfile.TemporaryDirectory(prefix="hyperalign-")
        try:
            self._start(Path(self._scratch.name))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it, and all that it started."""
        self.stop()

    def stop(self) -> None:
        """Ends the processes and removes the folder; a second call does nothing."""
        if self._process is not None:
            end_tree(self._process)
            self._process = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _start(self, scratch: Path) -> None:
        self.url, log = f"http://{ADDRESS}:{free_port()}", scratch / "comfyui.log"
        own = (self._tree / python for python in PYTHONS)
        python = next((str(path) for path in own if path.is_file()), sys.executable)
        command = [python, "main.py", "--listen", ADDRESS, "--port", self.url.rpartition(":")[2]]
        command += [
            "--disable-auto-launch",
            "--output-directory",
            str(scratch),
            "--temp-directory",
            str(scratch),
        ]
        command += ["--database-url", f"sqlite:///{(scratch / 'comfyui.db').as_posix()}", *self._arguments]
        # A foreign PYTHONPATH could put another `nodes` in front of ComfyUI's.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONUNBUFFERED": "1"}
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                command, cwd=self._tree, env=environment, stdin=subprocess.DEVNULL, stdout=stream,
                stderr=subprocess.STDOUT, start_new_session=os.name != "nt",
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not answers(self.url):
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-TAIL_LINES:]
                raise HyperAlignError(
                    f"The ComfyUI in {self._tree} did not start; where there is no GPU, end the command with "
                    "`-- --cpu`. Its last lines were:\n" + "\n".join(tail)
                )
            time.sleep(0.25)


def answers(url: str) -> bool:
    """Whether a ComfyUI answers there."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/system_stats", timeout=5):
            return True
    except (OSError, ValueError):  # refused, reset or timed out: not there, or not yet
        return False


def free_port() -> int:
    """Returns a port nothing listens on."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads its own session, and everything it started."""
    if process.poll() is not None:
        return
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
        process.wait(STOP_SECONDS)
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
