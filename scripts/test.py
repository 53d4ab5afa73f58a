"""Sets up the environment and runs every check: `python3 scripts/test.py [--fast] [pytest arguments]`.

Order: ruff, ruff format, import contracts, pyright, then pytest: unit and training tests, the tests in a
real ComfyUI, and last those of its page in a browser. `--fast` runs the unit tests alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

from hyperalign.openmp import wait_passively
from scripts.browser import browser_is_required, ensure_browser
from scripts.common import ROOT, ScriptError, say
from scripts.environment import enter_environment
from scripts.host import exit_on_termination

CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("lint-imports", "--no-logo"),
    ("pyright",),
)
UNIT = ("tests/unit",)
BROWSER = "tests/browser"
MAX_WORKERS = 4
"""Each holds up to 4 GB: PyTorch, a ComfyUI and a server."""
EVERYTHING = ("tests/unit", "tests/train", "tests/host", BROWSER)


def main(arguments: list[str]) -> int:
    """Runs the checks; returns the process's exit status."""
    exit_on_termination()
    fast = "--fast" in arguments
    passed_on = [argument for argument in arguments if argument != "--fast"]
    named = [argument for argument in passed_on if _is_place(argument)]
    places = named or list(UNIT if fast else EVERYTHING)
    try:
        tree = enter_environment(Path(__file__).resolve())
        skipped = _prepare_browser(places)
    except (ScriptError, OSError) as error:
        say(f"Error: {error}")
        return 1
    environment = os.environ | {"COMFYUI_PATH": str(tree)}
    wait_passively(environment)
    failed = [] if fast else [check[0] for check in CHECKS if _run(_tool(check), environment) != 0]
    workers = [] if named or fast else _workers(environment)
    # Those named are among what is passed on.
    command = [sys.executable, "-m", "pytest", *workers, *([] if named else places), *passed_on]
    if _run(command, environment) != 0:
        failed.append("pytest")
    if skipped:
        say(f"The browser tests were skipped: {skipped}")
    if failed:
        say(f"Failed: {', '.join(failed)}.")
    return 1 if failed else 0


def _workers(environment: dict[str, str]) -> list[str]:
    """Returns pytest's options for one process per core, and leaves each of them one thread.

    A file's tests stay in one process and files keep their order: those of the browser must be a process's
    last (tests/browser/conftest.py).
    """
    environment.setdefault("OMP_NUM_THREADS", "1")
    workers = str(min(os.cpu_count() or 1, MAX_WORKERS))
    return ["-n", workers, "--dist", "loadfile", "--no-loadscope-reorder"]


def _prepare_browser(places: list[str]) -> str:
    """Finds or installs the browser if its tests are to run; returns why they cannot, or nothing.

    Raises:
        ScriptError: there is no browser where its tests must not be skipped.
    """
    if not any(place.startswith(BROWSER) for place in places):
        return ""
    try:
        ensure_browser()
    except ScriptError as error:
        if browser_is_required():
            raise
        say(f"The browser tests will be skipped: {error}")
        return str(error)
    return ""


def _tool(check: tuple[str, ...]) -> list[str]:
    """Returns the command of a tool that pip put beside the interpreter."""
    return [str(Path(sys.executable).parent / check[0]), *check[1:]]


def _is_place(argument: str) -> bool:
    return (ROOT / argument.split("::")[0]).exists()


def _run(command: list[str], environment: dict[str, str]) -> int:
    say(f"\n$ {Path(command[0]).name} {' '.join(command[1:])}")
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # pytest then ends the server it started, which takes seconds
            process.wait()
            raise
    if status != 0:
        say(f"{Path(command[0]).name} ended with status {status} after {time.monotonic() - started:.0f} s.")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        say("Stopped; nothing is left running.")
        sys.exit(130)
