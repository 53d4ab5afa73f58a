"""The command line: `python -m hyperalign COMMAND`, or `hyperalign COMMAND` once installed."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import HyperAlignError
from ..openmp import wait_passively

FAILED, INTERRUPTED = 2, 130
"""The exit statuses after an error and after Ctrl-C; a signal's is 128 and its number."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the command line."""

    module: str
    """Relative to this package; imported when the command runs. Its `main(arguments)` returns the status."""
    summary: str
    interrupted: str = "Stopped."
    """What the user reads after Ctrl-C."""


_RESUMES = "Stopped; the scores so far are kept. The same command resumes from them."
_NOTHING_WRITTEN = "Stopped; nothing was written."

COMMANDS = {
    "sample": Command(
        "sample.command",
        "run a workflow on a local ComfyUI and save its images",
        "Stopped; ComfyUI does not run the workflow any more.",
    ),
    "score": Command("score.command", "score a folder of images with a reward model", _RESUMES),
    "geneval": Command("geneval", "score a folder of images with GenEval", _RESUMES),
    "audit": Command("audit.command", "measure the preferences of a reward model", _RESUMES),
    "study": Command(
        "study.command",
        "make a page for a blind study of images, and count its votes",
        _NOTHING_WRITTEN,
    ),
    "card": Command("card", "print the model card of a hypernetwork", _NOTHING_WRITTEN),
    "export": Command(
        "export", "save the weights generated at one timestep as a plain LoRA", _NOTHING_WRITTEN
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    A HyperAlignError becomes a line on standard error and status 2, Ctrl-C the command's sentence and 130.
    """
    signal.signal(signal.SIGTERM, _terminate)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    command = COMMANDS.get(given[0])
    if command is None:
        found = f"found the command {given[0]!r}, expected one of {', '.join(COMMANDS)}."
        sys.stderr.write(f"error: {found}\n\n{usage()}")
        return FAILED
    wait_passively()  # before the command imports torch
    try:
        return importlib.import_module(f".{command.module}", __package__).main(given[1:])
    except HyperAlignError as error:
        sys.stderr.write(f"error: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{command.interrupted}\n")
        return INTERRUPTED


def usage() -> str:
    """Returns the list of commands."""
    lines = [f"python -m hyperalign {name:10s}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["The commands of HyperAlign:", "", *lines, "", "Each has --help.", ""])


def _terminate(number: int, _frame: object) -> None:
    """Ends the process by an exception, so that a ComfyUI that the command started ends too."""
    sys.exit(128 + number)
