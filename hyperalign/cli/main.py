"""The one entry of all commands: `python -m hyperalign COMMAND`, or `hyperalign COMMAND` once installed."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

COMMANDS = {
    "sample": ("sample.command", "run a workflow on a local ComfyUI and save its images"),
    "score": ("score.command", "score a folder of images with a reward model"),
    "geneval": ("geneval", "score a folder of images as GenEval does"),
    "audit": ("audit.command", "see what a reward model prefers"),
    "study": ("study.command", "make a page for a blind study of images, and count its votes"),
    "card": ("card", "print the model card of a hypernetwork"),
    "export": ("export", "save one moment of a hypernetwork as a plain LoRA"),
}
"""Each command's module, which is imported when it runs, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    signal.signal(signal.SIGTERM, _leave)  # so that a ComfyUI it started ends too
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if given[0] not in COMMANDS:
        sys.stderr.write(
            f"error: found the command {given[0]!r}, expected one of {', '.join(COMMANDS)}.\n\n{usage()}"
        )
        return 2
    module = importlib.import_module(f".{COMMANDS[given[0]][0]}", __package__)
    return module.main(given[1:])


def usage() -> str:
    """Returns the list of commands."""
    lines = [f"python -m hyperalign {name:10s}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["The commands of HyperAlign:", "", *lines, "", "Each says more with --help.", ""])


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)
