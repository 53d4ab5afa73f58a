"""Compares the first losses of a training recipe at two commits: a refactoring must not change a digit.

python scripts/compare_losses.py main HEAD
python scripts/compare_losses.py main HEAD --recipe train/recipes/tiny_p.toml --steps 5 --optim.no-bf16

Each commit is checked out into a temporary worktree and trains there in its own process, with this Python and
this environment; options of train/train.py go to both. The exit status is 1 if a loss or a gradient norm
differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

from scripts.common import BUILD, ROOT, TAIL_LINES, ScriptError, say

ART = Path("tiny") / "art"
"""Fetched emoji art below build/, which the worktrees share; everything computed from it is computed anew."""
POLL_SECONDS = 0.5
STOP_SECONDS = 60.0


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Yields a folder with a commit checked out. Raises ScriptError if git does not know it."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "tree"
        command = ["git", "-C", str(ROOT), "worktree"]
        made = subprocess.run(
            [*command, "add", "--detach", str(folder), commit], capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise ScriptError(f"git cannot check out {commit}: {made.stderr.strip()}")
        try:
            if (BUILD / ART).is_dir():
                shutil.copytree(BUILD / ART, folder / "build" / ART)
            yield folder
        finally:
            subprocess.run([*command, "remove", "--force", str(folder)], check=False)


def first_steps(tree: Path, recipe: str, steps: int, options: list[str]) -> list[dict[str, Any]]:
    """Trains in a worktree until the log has `steps` lines; returns those. Raises ScriptError."""
    out, output = tree / "run", tree / "output.txt"
    command = [sys.executable, "train/train.py", "--recipe", recipe, "--run.out", str(out), *options]
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=tree, stdout=file, stderr=subprocess.STDOUT)
        try:
            while len(lines := read_lines(out / "log.jsonl")) < steps and process.poll() is None:
                time.sleep(POLL_SECONDS)
        finally:
            stop(process)
    if len(lines := read_lines(out / "log.jsonl")) < steps:
        tail = output.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        raise ScriptError(
            f"training ended after {len(lines)} of {steps} steps; its last lines were:\n" + "\n".join(tail)
        )
    return [json.loads(line) for line in lines[:steps]]


def read_lines(log: Path) -> list[str]:
    """Returns the whole lines of a log, none if it does not exist yet."""
    if not log.exists():
        return []
    return [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a run as Ctrl-C does, which waits for the current step."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def losses(line: dict[str, Any]) -> dict[str, float]:
    """Returns the losses and gradient norms in a line of the log: the numbers that no clock decides."""
    return {key: value for key, value in line.items() if key.endswith("_loss") or key.startswith("grad_norm")}


def equal(first: float | None, second: float | None) -> bool:
    """Returns whether two numbers are the same; not-a-number equals itself."""
    both_nan = first is not None and second is not None and math.isnan(first) and math.isnan(second)
    return first == second or both_nan


def compare(first: list[dict[str, Any]], second: list[dict[str, Any]], names: tuple[str, str]) -> int:
    """Prints the losses of two runs side by side; returns how many differ."""
    differences = 0
    say(f"{'step':>4}  {'metric':<18} {names[0][:14]:>14} {names[1][:14]:>14}")
    for step, lines in enumerate(zip(first, second, strict=True)):
        before, after = map(losses, lines)
        for key in sorted(before.keys() | after.keys()):
            same = equal(before.get(key), after.get(key))
            differences += not same
            columns = f"{before.get(key)!s:>14} {after.get(key)!s:>14}"
            say(f"{step:>4}  {key:<18} {columns}{'' if same else '  DIFFERS'}")
    return differences


def main() -> int:
    """Runs the command line; returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--recipe", default="train/recipes/tiny_s.toml", help="path inside the repository")
    parser.add_argument("--steps", type=int, default=3, help="how many steps to compare")
    parser.add_argument(
        "--cache", type=Path, help="a data.cache for both: scenes are encoded once, by the first"
    )
    options, passed_on = parser.parse_known_args()
    cache = ["--data.cache", str(options.cache.resolve())] if options.cache else []
    runs: list[list[dict[str, Any]]] = []
    try:
        for commit in options.commits:
            say(f"training {options.steps} steps at {commit} ...")
            with worktree(commit) as tree:
                runs.append(first_steps(tree, options.recipe, options.steps, [*cache, *passed_on]))
    except ScriptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differences = compare(runs[0], runs[1], tuple(options.commits))
    say(f"{differences} numbers differ." if differences else "All losses and gradient norms are equal.")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
