"""How long an image of a row takes, as ratios to one of the base model that is drawn right before it."""

from __future__ import annotations

import math
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
from train.generation.run import drawing, planned
from train.models.kernels import attention_kernels

ROUNDS = 6
"""Images of a row, and of the base model beside it."""


def untimed(runs: Sequence[Run], results: Mapping[str, Result]) -> list[Run]:
    """Returns, of each row without times, the first run that was trained here; the base model has none."""
    timed = {run.row for run in runs if results[run.name].times}
    found: dict[Row, Run] = {}
    for run in runs[1:]:
        if run.row not in timed and (not run.steps or run.hypernetwork.is_file()):
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
        plain = drawn_in_turn(base, device)
        plain()
        for run in runs:
            yield run, ratios(plain, drawn_in_turn(run, device), device)


def ratios(plain: Drawing, own: Drawing, device: torch.device) -> list[float]:
    """Returns the times of a row's images, each over that of the base model's image right before it."""
    found: dict[str, Times] = {}
    own()
    rounds(plain, {"own": own}, device, ROUNDS, math.inf, lambda rows, _: found.update(rows))
    return found["own"].ratios


def drawn_in_turn(run: Run, device: torch.device) -> Drawing:
    """Returns what draws the next prompt's image at each call. Raises HyperAlignError."""
    command = run.sampling(run.options.prompt_file, run.images)
    plan = planned(tyro.cli(Sampling, args=command[2:]))
    draw, jobs = drawing(plan, device), cycle(job for job in plan.jobs if job.image == 0)
    return lambda: draw([next(jobs)])
