"""A headless ComfyUI with this pack installed the way a user does, for the demo and the host tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hyperalign.cli.sample.server import end_tree
from scripts.archive import archive
from scripts.common import BUILD, ROOT, TAIL_LINES, ScriptError

ADDRESS = "127.0.0.1"
START_SECONDS = 240
HOST_FOLDERS = ("custom_nodes", "models/hyperalign", "input", "output", "temp", "user")


def install_pack(custom_nodes: Path) -> Path:
    """Copies what the registry's archive holds, and returns its folder."""
    target = custom_nodes / "hyperalign"
    for path in archive():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target / path)
    return target


def free_port(preferred: int | None = None) -> int:
    """Returns the preferred port if nothing listens there, else any free one."""
    for port in (preferred or 0, 0):
        with socket.socket() as probe:
            if os.name != "nt":  # a port left a moment ago counts as free, as it does for the server
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ScriptError(f"No free port on {ADDRESS}: end a few programs that listen on it, then run again.")


def exit_on_termination() -> None:
    """Turns SIGTERM into SystemExit and SIGINT, even where a shell had it ignored, into KeyboardInterrupt.

    `with Server(...)` then ends its process in both cases.
    """

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Server:
    """Runs ComfyUI between `__enter__` and `__exit__`, in a folder of its own under build/host.

    Attributes:
        tree: The ComfyUI source tree.
        name: Tells apart the folders and logs of several users ("demo", "tests").
        port: Wanted port; another is chosen if it is taken.
        arguments: More command-line arguments for ComfyUI.
        with_pack: Whether this pack is installed in it.
    """

    tree: Path
    name: str
    port: int | None = None
    arguments: tuple[str, ...] = ()
    with_pack: bool = True

    def __post_init__(self) -> None:
        self.base = BUILD / "host" / f"{self.name}-{os.getpid()}"
        self.log_path = BUILD / "host" / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's address; known once it is entered."""
        return f"http://{ADDRESS}:{self.port}"

    @property
    def models(self) -> Path:
        """Where this server looks for hypernetwork files."""
        return self.base / "models" / "hyperalign"

    def __enter__(self) -> Server:
        """Starts the server and returns when it answers.

        Raises:
            ScriptError: the server ended or did not answer in time; the message holds its last lines.
        """
        shutil.rmtree(self.base, ignore_errors=True)
        for folder in HOST_FOLDERS:
            (self.base / folder).mkdir(parents=True)
        try:
            if self.with_pack:
                install_pack(self.base / "custom_nodes")
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the server and everything it started, and removes its folder (the log stays)."""
        self.stop()

    def log(self) -> str:
        """Returns everything the server has said so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """Ends the process tree; a second call does nothing."""
        if self.process is not None:
            end_tree(self.process)
            self.process = None
        shutil.rmtree(self.base, ignore_errors=True)

    def _start(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        self.port = free_port(self.port)
        self.process = self._launch()
        while not self._answers():
            if self.process.poll() is not None:
                raise ScriptError(f"ComfyUI ended while starting; {self._last_words()}")
            if time.monotonic() > deadline:
                raise ScriptError(f"ComfyUI gave no answer within {START_SECONDS} s; {self._last_words()}")
            time.sleep(0.25)

    def _launch(self) -> subprocess.Popen[bytes]:
        database = (self.base / "user" / "comfyui.db").as_posix()
        command = [sys.executable, "main.py", "--base-directory", str(self.base), "--disable-auto-launch"]
        command += ["--listen", ADDRESS, "--port", str(self.port), "--database-url", f"sqlite:///{database}"]
        # Without the API nodes the host talks to nobody outside and starts faster.
        command += ["--disable-api-nodes", *_device_arguments(), *self.arguments]
        # A foreign PYTHONPATH could put another `nodes` in front of ComfyUI's.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONUNBUFFERED": "1"}
        with self.log_path.open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.tree, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=os.name != "nt",
            )  # fmt: skip

    def _answers(self) -> bool:
        try:
            self.system_stats()
        except OSError:  # refused, reset or timed out: not there yet
            return False
        return True

    def system_stats(self) -> dict[str, Any]:
        """Returns what the server says of itself and its devices."""
        with urllib.request.urlopen(f"{self.url}/system_stats", timeout=10) as response:
            return json.load(response)

    def _last_words(self) -> str:
        tail = self.log().rstrip().splitlines()[-TAIL_LINES:]
        return f"its last lines (all of them: {self.log_path}):\n" + "\n".join(tail)

    def check_alive(self) -> None:
        """Raises ScriptError with the server's last lines if it has ended."""
        if self.process is None or self.process.poll() is not None:
            raise ScriptError(f"ComfyUI ended in the middle of the work; {self._last_words()}")


def _device_arguments() -> list[str]:
    import torch  # not before the environment is up

    return [] if torch.cuda.is_available() else ["--cpu"]
