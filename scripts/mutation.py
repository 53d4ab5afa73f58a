"""Counts the small faults that fast tests find: `.venv/bin/python scripts/mutation.py [--module PATH]`.

Each mutant of `scripts/mutants.py` is imported in place of its module by a process of its own, split off one
that has already imported torch, and that module's own tests run in it. Nothing is written into the tree. What
no test can tell from the original is listed, with a reason, in `tests/mutation_equivalents.toml`. Needs
`pip install cosmic-ray` (the `mutation` extra). The figures go to `benchmarks/results/mutation.json`.

Exit status 1: a module of which less than 90 % are found or whose tests fail as they are, or a listed
equivalent that is no mutant any more. Each is told, and the other modules are still counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

from scripts.common import ROOT, say
from scripts.mutants import Mutant, mutants_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RESULTS = ROOT / "benchmarks" / "results" / "mutation.json"
EQUIVALENTS = ROOT / "tests" / "mutation_equivalents.toml"
LEAST_SHARE = 0.9
PATIENCE = 30
"""Real seconds for each second of processor time that a mutant may use: it may wait for ever."""
QUICK = 5.0
"""Seconds within which a test finds a mutant if it is to come first for the next ones."""
UNIT, REWARDS, TRAIN = "tests/unit/test_", "tests/unit/rewards/test_", "tests/train/test_"

TESTS: dict[str, tuple[str, ...]] = {
    "hyperalign/delta.py": (UNIT + "delta.py",),
    "hyperalign/perception.py": (UNIT + "perception.py",),
    "hyperalign/hypernetwork.py": (UNIT + "hypernetwork_numbers.py",),
    "hyperalign/schedule.py": (UNIT + "schedule.py",),
    "hyperalign/strength.py": (UNIT + "strength_numbers.py", UNIT + "strength.py"),
    "hyperalign/targets.py": (UNIT + "targets.py",),
    "hyperalign/checkpoint.py": (UNIT + "checkpoint.py",),
    "hyperalign/export.py": (UNIT + "export_tensors.py",),
    "hyperalign/search.py": (UNIT + "search.py",),
    "hyperalign/selection.py": (UNIT + "selection.py",),
    "hyperalign/guidance.py": (UNIT + "guidance.py",),
    "hyperalign/trace.py": (UNIT + "trace.py",),
    "hyperalign/trace_energy.py": (UNIT + "trace_energy.py",),
    "hyperalign/trace_pca.py": (UNIT + "trace_pca.py",),
    "hyperalign/families/dit.py": (UNIT + "family_places.py",),
    "hyperalign/families/flux.py": (UNIT + "family_places.py",),
    "hyperalign/families/sd3.py": (UNIT + "family_places.py",),
    "hyperalign/families/unet.py": (UNIT + "family_places.py",),
    "hyperalign/hosts/run_state.py": (UNIT + "run_state.py",),
    "hyperalign/hosts/features.py": (UNIT + "features.py",),
    "hyperalign/hosts/forwards.py": (UNIT + "forwards.py",),
    "hyperalign/hosts/layers.py": (UNIT + "layer_weights.py",),
    "hyperalign/rewards/images.py": (REWARDS + "rewards_pixels.py",),
    "hyperalign/rewards/text.py": (REWARDS + "rewards_text.py",),
    "hyperalign/rewards/clip.py": (REWARDS + "rewards_clip.py",),
    "train/randomness.py": (TRAIN + "randomness.py",),
    "train/trainer.py": (TRAIN + "trainer_step.py", TRAIN + "trainer_run.py", TRAIN + "trainer_processes.py"),
    "train/processes.py": (TRAIN + "processes.py",),
    "train/objective.py": (TRAIN + "objective.py",),
    "train/noise.py": (TRAIN + "noise.py",),
    "train/relative_distance.py": (TRAIN + "relative_distance.py",),
    "train/rollout.py": (TRAIN + "rollout.py",),
}
"""The fast tests that are each module's own."""


class TestsFail(Exception):
    """A module's tests fail without any fault put into it."""


@dataclass(slots=True)
class Outcome:
    """What became of a module's mutants."""

    survivors: list[Mutant] = field(default_factory=list[Mutant])
    stale: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    """What is listed as an equivalent and is no mutant."""
    killed: int = 0
    equivalents: int = 0
    left_out: int = 0
    """Of the others, when a sample was drawn."""
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """The part of the mutants that are not equivalent which the tests find."""
        return self.killed / max(1, self.killed + len(self.survivors))

    def figures(self) -> dict[str, Any]:
        """Returns what the results file says of it."""
        survived = len(self.survivors)
        figures = {
            "mutants": self.killed + survived + self.equivalents + self.left_out, "killed": self.killed,
            "survived": survived, "equivalents": self.equivalents, "share": round(self.share, 3),
            "seconds": round(self.seconds, 1),
        }  # fmt: skip
        return figures | ({"left_out": self.left_out} if self.left_out else {})


class Imposter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a text instead of from its file."""

    def __init__(self, path: Path, source: str) -> None:
        self._name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        self._path, self._source = path, source

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Claims the one module."""
        if fullname != self._name:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=str(self._path))
        spec.has_location = True
        return spec

    def exec_module(self, module: Any) -> None:
        """Runs the text."""
        exec(compile(self._source, str(self._path), "exec"), module.__dict__)  # noqa: S102


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the mutants of the named modules, or of all; returns the process's exit status."""
    parser = argparse.ArgumentParser(description="Counts the small faults that a module's tests find.")
    parser.add_argument(
        "--module", action="append", choices=sorted(TESTS), help="only these; may be repeated"
    )
    parser.add_argument("--list-survivors", action="store_true", help="show what no test finds")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once")
    parser.add_argument("--sample", type=int, default=0, help="only so many of each module, drawn by lot")
    options = parser.parse_args(arguments)
    sys.path[:] = [place for place in sys.path if place != str(ROOT / "scripts")]
    listed = _equivalents()
    wrong = False
    for unknown in sorted(set(listed) - set(TESTS)):
        say(f"{EQUIVALENTS.name} lists mutants of {unknown}, of which no tests are known. Take them out.")
        wrong = True
    for module in options.module or TESTS:
        missing = [test for test in TESTS[module] if not (ROOT / test).is_file()]
        if missing:
            say(f"{module}: there is no {missing[0]}")
            wrong = True
            continue
        try:
            outcome = run(module, listed.get(module, {}), options.jobs, options.sample)
        except TestsFail as failure:  # the other modules can still be counted
            say(str(failure))
            wrong = True
            continue
        wrong = wrong or bool(outcome.stale)
        _record(module, outcome)
        figures = "  ".join(f"{name} {value}" for name, value in outcome.figures().items())
        say(f"{module}: {figures}")
        if options.list_survivors:
            for mutant in outcome.survivors:
                say(
                    f"  {module}:{mutant.line} {mutant.function}\n    - {mutant.before}\n    + {mutant.after}"
                )
        wrong = wrong or outcome.share < LEAST_SHARE
    return 1 if wrong else 0


def run(module: str, equivalents: dict[tuple[str, str, str], str], jobs: int, sample: int = 0) -> Outcome:
    """Runs the tests of a module against each of its mutants, or against a sample of those not listed."""
    path, outcome, start = ROOT / module, Outcome(), time.perf_counter()
    source = path.read_text(encoding="utf-8")
    mutants = mutants_of(source)
    outcome.stale = sorted(set(equivalents) - {mutant.key for mutant in mutants})
    for key in outcome.stale:
        say(f"{EQUIVALENTS.name} lists for {module} what is no mutant: {key}. Take it out.")
    alone, reached = _warm_up(module)
    with tempfile.TemporaryDirectory() as folder:
        survives, seconds = _wait(_start(module, source, alone, Path(folder), limit=600))
        if not survives:
            raise TestsFail(f"The tests of {module} fail as they are: pytest {' '.join(TESTS[module])}")
        limit = math.ceil(10.0 + 2 * seconds)
        waiting = [mutant for mutant in mutants if mutant.key not in equivalents]
        outcome.equivalents = len(mutants) - len(waiting)
        if 0 < sample < len(waiting):
            outcome.left_out = len(waiting) - sample
            waiting = random.Random(0).sample(waiting, sample)
        finders: list[str] = []  # the last one first
        while waiting:
            together, waiting = waiting[:jobs], waiting[jobs:]
            running: list[tuple[Mutant, int]] = []
            began = time.perf_counter()
            for mutant in together:
                first = _likely(mutant, reached, finders)
                process = _start(module, mutant.source, alone, Path(folder), first, limit=limit)
                running.append((mutant, process))
            for mutant, process in running:
                if _wait(process, PATIENCE * limit)[0]:
                    outcome.survivors.append(mutant)
                    continue
                outcome.killed += 1
                quick = time.perf_counter() - began < QUICK
                if quick and (note := _note(Path(folder) / str(process))).is_file():
                    finders = [test := note.read_text(encoding="utf-8"), *(t for t in finders if t != test)]
    outcome.seconds = time.perf_counter() - start
    return outcome


def _likely(mutant: Mutant, reached: dict[str, list[str]], finders: list[str]) -> list[str]:
    """Returns the tests that enter the mutant's function, those first that found other mutants last."""
    entering = reached.get(mutant.function.split(".")[-1], [])
    return [test for test in finders if test in entering or not entering] + entering


def _warm_up(module: str) -> tuple[bool, dict[str, list[str]]]:
    """Imports here whatever of other projects the module's tests import, so that no mutant has to.

    Returns whether they pass without any conftest.py, whose fixtures build whole models, and which of them
    enter each function of the module, the quickest first.
    """
    for alone in (True, False):
        reading, writing = os.pipe()
        with tempfile.TemporaryDirectory() as folder:
            if (process := os.fork()) == 0:
                watch, place = _Watch(ROOT / module), Path(folder) / "run"
                status = _test(TESTS[module], alone, place, _FirstFailure(place), watch)
                with os.fdopen(writing, "w") as pipe:
                    json.dump([_imported(), watch.reached()], pipe)
                os._exit(status)
            os.close(writing)
            with os.fdopen(reading) as pipe:
                told = pipe.read()
            failed = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if not failed:
            break
    else:
        raise TestsFail(f"The tests of {module} fail as they are: pytest {' '.join(TESTS[module])}")
    names, reached = json.loads(told)
    for name in names:
        with contextlib.suppress(Exception):  # some only their own package may import
            importlib.import_module(name)
    gc.freeze()
    return alone, reached


def _imported() -> list[str]:
    origins = {name: str(getattr(found, "__file__", "") or "") for name, found in sys.modules.items()}
    return [name for name, origin in origins.items() if "site-packages" in origin or "lib/python" in origin]


def _start(
    module: str, source: str, alone: bool, folder: Path, first: Sequence[str] = (), *, limit: int
) -> int:
    """Splits off a process whose exit status says whether the tests pass with this text as the module.

    It is ended after `limit` seconds of processor time, which another job on the machine does not shorten.
    """
    process = os.fork()
    if process == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        sys.meta_path.insert(0, Imposter(ROOT / module, source))
        place = folder / str(os.getpid())
        status = 1
        try:
            status = _test(TESTS[module], alone, place, _FirstFailure(place, first))
        finally:
            shutil.rmtree(place, ignore_errors=True)
            os._exit(status)
    return process


def _test(tests: Sequence[str], alone: bool, folder: Path, *plugins: object) -> int:
    """Runs tests in this process, silently; returns pytest's exit status."""
    import hypothesis
    import pytest
    import torch

    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    hypothesis.settings.register_profile(
        "mutation", derandomize=True, database=None, deadline=None, max_examples=10,
        suppress_health_check=list(hypothesis.HealthCheck), print_blob=False,
    )  # fmt: skip
    hypothesis.settings.load_profile("mutation")
    gc.disable()
    options = ["-q", "--tb=no", "--assert=plain", f"--basetemp={folder}", *["--noconftest"] * alone]
    without = ("cacheprovider", "unraisableexception", "threadexception", "doctest", "junitxml")
    options += [word for name in without for word in ("-p", f"no:{name}")]
    places = (str(ROOT / test) for test in tests)
    return int(pytest.main([*options, *places], plugins=plugins))


class _FirstFailure:
    """Ends the process at the first test that fails: what follows changes nothing. Some tests come first.

    Those are the tests that found the last mutants, as a line's mutants are mostly found by the same test,
    and then the others that enter the function; of the rest the slow ones are last.
    """

    def __init__(self, folder: Path, first: Sequence[str] = ()) -> None:
        self._folder = folder
        self._ranks = {test: rank for rank, test in enumerate(dict.fromkeys(first))}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Is called by pytest with all tests."""
        last = len(self._ranks)
        items.sort(key=lambda item: (self._ranks.get(item.nodeid, last), hasattr(item.obj, "hypothesis")))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Is called by pytest after each part of a test."""
        if report.failed:
            _note(self._folder).write_text(report.nodeid, encoding="utf-8")
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(1)


class _Watch:
    """Notes which functions of a file each test enters, and how long it takes."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._tests: dict[str, tuple[float, set[str]]] = {}
        self._began = 0.0

    def reached(self) -> dict[str, list[str]]:
        """Returns the tests that enter each function, the quickest first."""
        found: dict[str, list[str]] = {}
        for test, (_, functions) in sorted(self._tests.items(), key=lambda item: item[1][0]):
            for function in sorted(functions):
                found.setdefault(function, []).append(test)
        return found

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Is called by pytest before each test."""
        functions = self._tests.setdefault(nodeid, (0.0, set()))[1]

        def see(frame: Any, _event: str, _argument: Any) -> None:
            if frame.f_code.co_filename == self._path:
                functions.add(frame.f_code.co_name)

        self._began = time.perf_counter()
        sys.settrace(see)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Is called by pytest after each test."""
        sys.settrace(None)
        self._tests[nodeid] = time.perf_counter() - self._began, self._tests[nodeid][1]


def _note(folder: Path) -> Path:
    """Returns where the process with this folder leaves the name of the test that failed."""
    return folder.with_suffix(".failed")


def _wait(process: int, patience: float = math.inf) -> tuple[bool, float]:
    """Returns whether a process succeeds, and its processor time; `patience` is in real seconds."""
    end = time.perf_counter() + patience
    while True:
        ended, status, used = os.wait4(process, os.WNOHANG)
        if ended:
            return status == 0, used.ru_utime + used.ru_stime
        if time.perf_counter() > end:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return False, math.inf
        time.sleep(0.005)


def _equivalents() -> dict[str, dict[tuple[str, str, str], str]]:
    """Returns the listed equivalents of each file and why no test can find them."""
    found: dict[str, dict[tuple[str, str, str], str]] = {}
    if EQUIVALENTS.is_file():
        for one in tomllib.loads(EQUIVALENTS.read_text(encoding="utf-8")).get("equivalent", []):
            key = one["function"], one["before"], one["after"]
            found.setdefault(one["file"], {})[key] = one["reason"]
    return found


def _record(module: str, outcome: Outcome) -> None:
    known: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    known[module] = outcome.figures()
    ordered = {name: known[name] for name in TESTS if name in known}
    RESULTS.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
