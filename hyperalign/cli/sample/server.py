"""Starts a ComfyUI from its folder and ends it again. Standard library only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from ...errors import HyperAlignError
from ...openmp import wait_passively

ADDRESS = "127.0.0.1"
START_SECONDS = 300
STOP_SECONDS = 8
TAIL_LINES = 12
PYTHONS = (
    ".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "venv/Scripts/python.exe",
    "../python_embeded/python.exe",
)  # fmt: skip
"""Where a ComfyUI has its own interpreter, the portable one of Windows too."""


@dataclass
class ComfyServer(AbstractContextManager["ComfyServer"]):
    """Runs the ComfyUI of a folder, with its models and packs, between `__enter__` and `__exit__`.

    Attributes:
        tree: The folder of ComfyUI.
        log_path: The file for all that it prints.
        database: The file for its database.
        arguments: More of its command-line arguments, as `--cpu`.
        port: The wanted port; another is chosen if it is taken.
        python: The interpreter; by default this process's own.
        advice: A sentence for the errors of a server that ended.

    Raises:
        HyperAlignError: the folder is no ComfyUI.
    """

    tree: Path
    log_path: Path
    database: Path
    arguments: tuple[str, ...] = ()
    port: int = 0
    python: Path = field(default_factory=lambda: Path(sys.executable))
    advice: str = ""
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not (self.tree / "main.py").is_file() or not (self.tree / "comfy").is_dir():
            raise HyperAlignError(
                f"{self.tree} is no ComfyUI: expected main.py and comfy/ in it. Give its folder."
            )

    @property
    def url(self) -> str:
        """The server's address; known once it is entered."""
        return f"http://{ADDRESS}:{self.port}"

    def __enter__(self) -> ComfyServer:
        """Starts it and returns when it answers.

        Raises:
            HyperAlignError: it ended or did not answer in time; the message holds its last lines.
        """
        self.port = free_port(self.port)
        try:
            self._process = self._launch()
            self._wait(self._process)
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
        """Ends the processes; a second call does nothing."""
        if self._process is not None:
            end_tree(self._process)
            self._process = None

    def log(self) -> str:
        """Returns everything that the server has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def check_alive(self) -> None:
        """Raises HyperAlignError with the server's last lines if it has ended."""
        if self._process is None or self._process.poll() is not None:
            raise HyperAlignError(f"ComfyUI ended during the work. {self._last_lines()}")

    def _launch(self) -> subprocess.Popen[bytes]:
        command = [str(self.python), "main.py", "--listen", ADDRESS, "--port", str(self.port)]
        command += ["--disable-auto-launch", "--database-url", f"sqlite:///{self.database.as_posix()}"]
        # A foreign PYTHONPATH could put another `nodes` in front of ComfyUI's.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONUNBUFFERED": "1"}
        wait_passively(environment)
        with self.log_path.open("wb") as log:
            return subprocess.Popen(
                [*command, *self.arguments], cwd=self.tree, env=environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=os.name != "nt",
            )  # fmt: skip

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not answers(self.url):
            ended = process.poll() is not None
            if ended or time.monotonic() > deadline:
                what = "ended while starting" if ended else f"gave no answer within {START_SECONDS} s"
                raise HyperAlignError(f"The ComfyUI in {self.tree} {what}. {self._last_lines()}")
            time.sleep(0.25)

    def _last_lines(self) -> str:
        tail = self.log().rstrip().splitlines()[-TAIL_LINES:]
        return "\n".join([f"{self.advice} Its last lines were:".strip(), *tail])


def own_python(tree: Path) -> Path:
    """Returns the interpreter that a ComfyUI has in its folder, this process's own if it has none."""
    own = (tree.resolve() / python for python in PYTHONS)
    return next((path for path in own if path.is_file()), Path(sys.executable))


def answers(url: str) -> bool:
    """Whether a ComfyUI answers there."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/system_stats", timeout=5):
            return True
    except (OSError, ValueError):  # refused, reset or timed out: not there, or not yet
        return False


def free_port(wanted: int = 0) -> int:
    """Returns the wanted port if nothing listens there, else any free one."""
    with socket.socket() as probe:
        if os.name != "nt":  # a port left a moment ago counts as free, as it does for the server
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, wanted))
        except OSError:
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
