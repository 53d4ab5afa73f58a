"""Paths, the error of the set-up scripts, and how they run pip."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
TAIL_LINES = 12


class ScriptError(RuntimeError):
    """Something the user can act on. The message is one clear sentence, with a log's tail if it helps."""


def say(text: str) -> None:
    """Prints one line at once, also through a pipe."""
    print(text, flush=True)


def run_pip(python: Path, arguments: list[str], purpose: str) -> None:
    """Runs pip, with one changing status line on a terminal.

    Raises:
        ScriptError: pip failed; the message ends with its last lines.
    """
    say(f"Installing {purpose} ...")
    command = [str(python), "-m", "pip", *arguments, "--disable-pip-version-check", "--progress-bar", "off"]
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                tail.append(line.rstrip())
                _show_status(line.strip())
        except BaseException:
            process.terminate()
            raise
    _show_status("")
    if process.returncode != 0:
        raise ScriptError(f"pip could not install {purpose}; its last lines were:\n" + "\n".join(tail))


def _show_status(line: str) -> None:
    if sys.stdout.isatty() and (not line or line.startswith(("Collecting", "Downloading", "Installing"))):
        print(f"\r{line[:78]:78s}\r", end="", flush=True)
