"""What every run of benchmarks.tables gave, a line of --out/runs.jsonl each; reports are made of them alone.

Rows and seeds can be run in parts, on several machines too: the lines of the parts' files, together in the
runs.jsonl of one folder, are not run again there, and its report is that of all.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table_runs import Options, Run
from hyperalign.errors import HyperAlignError
from hyperalign.files import write_text
from hyperalign.image_sets import read_record
from train.data.prompts import json_lines
from train.evaluation.table import Numbers

Scores = dict[str, dict[str, Numbers]]
"""By metric and row or set: one number a prompt (P,)."""
DIGITS = 5
"""Decimals of a score."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run gave."""

    name: str
    """Of the run."""
    setting: dict[str, Any]
    """What all runs of a report have in common."""
    environment: dict[str, Any]
    """Device and versions."""
    training_seconds: float
    """Of its training, beside others."""
    times: list[float]
    """Of single images, as ratios to the base model's; measured for one seed of a row."""
    scores: dict[str, list[float]]
    """By metric: one number a prompt, the mean over its images."""


def setting_of(options: Options) -> dict[str, Any]:
    """Returns what all runs of a report have in common; the prompts are written already."""
    return {
        "base": options.base, "budget": options.budget,
        "prompts": hashlib.sha256(options.prompt_file.read_bytes()).hexdigest(),
        "images of each prompt": options.images_per_prompt, "sampling steps": options.sampling_steps,
    }  # fmt: skip


def results_path(options: Options) -> Path:
    """Returns the file of all results."""
    return options.out / "runs.jsonl"


def read_results(options: Options) -> dict[str, Result]:
    """Returns the results by run. Raises HyperAlignError on a damaged line or one of another setting."""
    path, setting, found = results_path(options), setting_of(options), dict[str, Result]()
    for number, line in json_lines(path) if path.is_file() else ():
        try:
            result = Result(**line)
        except TypeError as error:
            raise HyperAlignError(
                f"{path}, line {number}: {error}. Delete the line: it is made anew."
            ) from error
        others = {name: value for name, value in result.setting.items() if value != setting.get(name)}
        if others:
            expected = {name: setting.get(name) for name in others}
            raise HyperAlignError(
                f"{path}, line {number}: {result.name} was run with {others}; found {expected} in this call. "
                "Give the same options, or another --out."
            )
        found[result.name] = result
    return found


def write_results(options: Options, results: Mapping[str, Result]) -> None:
    """Writes all results."""
    lines = [json.dumps(asdict(result)) + "\n" for result in results.values()]
    write_text(results_path(options), "".join(lines))


def results_of(options: Options, runs: Sequence[Run]) -> dict[str, Result]:
    """Returns what runs gave that are trained, sampled and scored, without times. Raises HyperAlignError."""
    scores = read_scores(options.out / "evaluation" / "prompts.csv")
    return {
        run.name: Result(
            run.name, setting_of(options), environment_of(run.images), training_seconds(run),
            [],
            {name: [round(one, DIGITS) for one in sets[run.name].tolist()] for name, sets in scores.items()},
        )
        for run in runs
    }  # fmt: skip


def read_scores(path: Path) -> Scores:
    """Returns the scores of every set by metric, as evaluate.py wrote them."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names, sets = list(rows[0])[4:], list(dict.fromkeys(row["method"] for row in rows))
    own = {name: [row for row in rows if row["method"] == name] for name in sets}
    return {
        metric: {name: np.array([float(row[metric]) for row in found]) for name, found in own.items()}
        for metric in names
    }


def environment_of(folder: Path) -> dict[str, Any]:
    """Returns device and versions of a set of images. Raises HyperAlignError where there is no record."""
    if (record := read_record(folder)) is None:
        raise HyperAlignError(f"{folder} has no record. Delete the folder, and run the same command again.")
    return {name: record.environment[name] for name in ("device", "versions")}


def machine_text(environment: Mapping[str, Any]) -> str:
    """Returns device and versions in words."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{environment['device']}; {versions}"


def training_seconds(run: Run) -> float:
    """Returns the seconds of all steps of a run's training; 0 where nothing is trained."""
    log = run.hypernetwork.parent / "log.jsonl"
    if not run.steps:
        return 0.0
    return sum(json.loads(line).get("seconds", 0.0) for line in log.read_text(encoding="utf-8").splitlines())
