"""A headless ComfyUI with this pack installed the way a user does, for the demo and the host tests."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from hyperalign.cli.sample.server import ComfyServer
from scripts.archive import archive
from scripts.common import BUILD, ROOT

HOST_FOLDERS = ("custom_nodes", "models/hyperalign", "input", "output", "temp", "user")


def install_pack(custom_nodes: Path) -> Path:
    """Copies what the registry's archive holds, and returns its folder."""
    target = custom_nodes / "hyperalign"
    for path in archive():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target / path)
    return target


def exit_on_termination() -> None:
    """Turns SIGTERM into SystemExit and SIGINT, even where a shell had it ignored, into KeyboardInterrupt.

    `with Server(...)` then ends its process in both cases.
    """

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Server(ComfyServer):
    """Runs ComfyUI between `__enter__` and `__exit__`, in a folder of its own under build/host.

    Args:
        tree: The ComfyUI source tree.
        name: Distinguishes the folders and logs of several users ("demo", "tests").
        port: The wanted port; another is chosen if it is taken.
        with_pack: Whether this pack is installed in it.
    """

    def __init__(self, tree: Path, name: str, port: int | None = None, with_pack: bool = True) -> None:
        self.base = BUILD / "host" / f"{name}-{os.getpid()}"
        log_path = BUILD / "host" / f"{name}.log"
        # Without the API nodes the host connects to nothing outside and starts faster.
        arguments = ("--base-directory", str(self.base), "--disable-api-nodes", *_device_arguments())
        super().__init__(
            tree, log_path, self.base / "comfyui.db", arguments, port or 0, advice=f"Its log is {log_path}."
        )
        self._with_pack = with_pack

    @property
    def models(self) -> Path:
        """The folder where this server looks for hypernetwork files."""
        return self.base / "models" / "hyperalign"

    def __enter__(self) -> Server:
        """Starts the server and returns when it answers.

        Raises:
            HyperAlignError: it ended or did not answer in time; the message holds its last lines.
        """
        shutil.rmtree(self.base, ignore_errors=True)
        for folder in HOST_FOLDERS:
            (self.base / folder).mkdir(parents=True)
        try:
            if self._with_pack:
                install_pack(self.base / "custom_nodes")
            super().__enter__()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends the server and everything it started, and removes its folder. The log stays."""
        super().stop()
        shutil.rmtree(self.base, ignore_errors=True)


def _device_arguments() -> list[str]:
    import torch  # not before the environment is up

    return [] if torch.cuda.is_available() else ["--cpu"]
