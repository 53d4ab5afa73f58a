"""How long an image of a row takes, as ratios to one of the base model that is drawn right before it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle

import torch
import tyro
from accelerate import Accelerator

from benchmarks.rounds import Row as Times
from benchmarks.rounds import Run as Drawing
from benchmarks.rounds import rounds
from benchmarks.table_results import Result
from benchmarks.table_rows import Row
from benchmarks.table_runs import Run
from train.generation.options import Options as Sampling
from train.generation.run import Draw, Job, drawing, planned
from train.models.kernels import attention_kernels

ROUNDS, SECONDS = 20, 60.0
"""Images of a row, and of the base model beside it, and after how long no further ones are drawn."""


def untimed(runs: Sequence[Run], results: Mapping[str, Result]) -> list[Run]:
    """Returns, of each row without times, the first run that was trained here; the base model has none."""
    timed = {run.row for run in runs if results[run.name].times}
    found: dict[Row, Run] = {}
    for run in runs[1:]:
        if run.row not in timed and run.is_trained:
            found.setdefault(run.row, run)
    return list(found.values())


def image_times(base: Run, runs: Sequence[Run]) -> Iterator[tuple[Run, list[float]]]:
    """Yields each run with its images' times over the base model's; the prompts are written already.

    All is drawn in this process, one image at a time: two processes differ by more than two rows do. On a CPU
    it is processor time on one thread. Raises HyperAlignError on a missing or damaged file.
    """
    if not runs:
        return
    device = Accelerator().device
    torch.set_num_threads(1)
    with attention_kernels(base.config.run.attention_kernels, device):
        plain = opened(base, device)
        for run in runs:
            yield run, ratios(plain, opened(run, device), device)


def opened(run: Run, device: torch.device) -> tuple[Draw, list[Job]]:
    """Returns what draws a run's images, and the first one of each prompt. Raises HyperAlignError."""
    command = run.sampling(run.options.prompt_file, run.images)
    plan = planned(tyro.cli(Sampling, args=command[2:]))
    return drawing(plan, device), [job for job in plan.jobs if job.image == 0]


def ratios(base: tuple[Draw, list[Job]], own: tuple[Draw, list[Job]], device: torch.device) -> list[float]:
    """Returns the times of a row's images, each over that of the base model's image right before it."""
    found: dict[str, Times] = {}
    runs = [in_turn(*drawn) for drawn in (base, own)]
    for warm_up in runs:
        warm_up()
    deadline = time.monotonic() + SECONDS
    rounds(runs[0], {"own": runs[1]}, device, ROUNDS, deadline, lambda rows, _: found.update(rows))
    return found["own"].ratios


def in_turn(draw: Draw, jobs: Sequence[Job]) -> Drawing:
    """Returns what draws the next of these images at each call."""
    left = cycle(jobs)
    return lambda: draw([next(left)])
