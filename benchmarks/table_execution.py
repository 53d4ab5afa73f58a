"""Runs the commands of benchmarks.tables: trainings, samplings and scores, unless their results are there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.table_runs import ROOT, Options, Run
from hyperalign.errors import HyperAlignError
from hyperalign.threads import Threads

KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""Lets glibc keep freed memory, which it gives back and takes again in a sixth of a CPU training's time."""


def prepare(options: Options, runs: Sequence[Run]) -> None:
    """Trains SPO's step-aware preference model, unless it is there. Raises HyperAlignError."""
    for model, run in preference_models(runs).items():
        execute(run.preparation(model), log_of(options, "step_reward"))


def preference_models(runs: Sequence[Run]) -> dict[Path, Run]:
    """Returns the step-aware preference models that are still to be trained, each with a run of SPO."""
    needed = {run.step_reward: run for run in runs if run.step_reward is not None}
    return {model: run for model, run in needed.items() if not model.exists()}


def make_all(options: Options, runs: Sequence[Run], prompts: Path) -> None:
    """Makes all runs, as many at a time as there are jobs. Raises HyperAlignError."""
    with Threads(options.jobs) as workers, tqdm(total=len(runs), unit="run") as bar:
        for _ in workers.in_order(lambda run: make(run, prompts), runs, ahead=options.jobs):
            bar.update()


def make(run: Run, prompts: Path) -> None:
    """Trains a row and samples its images, unless they are there. Raises HyperAlignError."""
    o = run.options
    if not run.is_trained:
        execute(run.training(), log_of(o, f"{run.name}.training"), o.jobs)
    if not run.is_sampled:
        execute(run.sampling(prompts, run.images), log_of(o, f"{run.name}.images"), o.jobs)


def log_of(options: Options, name: str) -> Path:
    """Returns the log of a command."""
    return options.out / "logs" / f"{name}.log"


def execute(command: Sequence[str], log: Path, jobs: int = 1) -> None:
    """Runs a command into a log; commands beside others have a thread each. Raises HyperAlignError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = KEPT_MEMORY | os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        said = [
            line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        raise HyperAlignError(
            f"{' '.join(command)}\nended with {done.returncode}: {said[-1] if said else 'it said nothing'}\n"
            f"Its output is in {log}. The same command goes on from here."
        )


def score(options: Options, sets: Mapping[str, Path]) -> None:
    """Scores folders of images by name, in one table. Raises HyperAlignError."""
    command = [
        sys.executable, str(ROOT / "train" / "evaluate.py"), "--out", str(options.out / "evaluation"),
        "--grid-prompts", "1", *options.evaluation,
        "--sets", *(f"{name}={folder}" for name, folder in sets.items()),
    ]  # fmt: skip
    execute(command, log_of(options, "evaluation"))


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function; an error ends the program with a sentence."""
    try:
        main()
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        sys.exit(130)
