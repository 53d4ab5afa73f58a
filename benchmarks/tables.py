"""The paper's tables: every method as a row, with equal budgets, on one base model.

    python -m benchmarks.tables --out runs/tables --jobs 2           # the embedded model: hours; resumes
    python -m benchmarks.tables --out T --rows dpo hyperalign-s --seeds 0 --budget 2000
    python -m benchmarks.tables --out T --base sd15 --budget 0 --prompts data/test_geneval.jsonl \
        --launch accelerate launch --config_file train/recipes/accelerate/4_gpus.yaml

Every row is trained by `train/train.py` from each seed for the steps that --budget allows, sampled by
`train/generate.py` on the same prompts and noise, and scored by `train/evaluate.py`. A budget is samples that
pass the backbone, forwards or backwards; without one, recipes keep their steps. The time of an image is
measured apart, in turns with the base model in one process.

Writes --out/report.md, report.csv, report.json, report.html and the figures. What is there is not made again:
the same command resumes. What a run gave is a line of --out/runs.jsonl. Rows or seeds can be run in parts, on
several machines too: the lines of all parts in the runs.jsonl of one folder give the report of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator

from benchmarks.rounds import timed
from benchmarks.table_execution import (
    execute,
    log_of,
    make_all,
    preference_models,
    prepare,
    run_command,
    score,
)
from benchmarks.table_figures import paper_figures, row_plots
from benchmarks.table_report import measured, write_report
from benchmarks.table_results import read_results, results_of, write_results
from benchmarks.table_runs import Options, Run, has_cfg, runs_of, write_prompts
from benchmarks.table_times import image_times, untimed
from hyperalign.schedule import Schedule
from train.data.prompts import load_prompts
from train.inputs import sampling_inputs
from train.methods.passes import step_passes
from train.models.base import cfg_conditions
from train.rollout import Denoiser, SampledModel


def main(options: Options) -> None:
    """Trains, samples, scores and writes the report. Raises HyperAlignError."""
    runs, prompts = runs_of(options), write_prompts(options)
    results = read_results(options)
    left = [run for run in runs if run.name not in results]
    trainings, sets = sum(not run.is_trained for run in left), sum(not run.is_sampled for run in left)
    time = hours(options, left, prompts) if left else 0.0
    print(
        f"{trainings} trainings and {sets} sets of images: about {time:.1f} hours more, "
        f"{options.jobs} at a time.",
        flush=True,
    )
    if left:
        prepare(options, left)
        make_all(options, left, prompts)
        score(options, {run.name: run.images for run in left})
        results |= results_of(options, left)
        write_results(options, results)
    for run, times in image_times(runs[0], untimed(runs, results)):
        results[run.name] = dataclasses.replace(results[run.name], times=times)
        write_results(options, results)
    found = measured(options, runs, results)
    times = {key: cost.time for key, cost in found.costs.items()}
    figures = row_plots(found.metrics, found.titles, times, options.out)
    figures += paper_figures(
        options, runs, prompts, lambda command, name: execute(command, log_of(options, name))
    )
    print(write_report(found, figures, options.out))


@torch.no_grad()
def hours(options: Options, runs: Sequence[Run], prompts: Path) -> float:
    """Returns how long trainings and samplings take: their passes at the seconds of one on this machine."""
    common, texts = runs[0].config, load_prompts(prompts)
    base, encoder = sampling_inputs(common, Accelerator(), texts[:1])
    batch, scale = options.batch, common.objective.guidance_scale
    cond, uncond = cfg_conditions(base, encoder, texts[:1] * batch, scale)
    denoiser = Denoiser(SampledModel(base, None, Schedule("I"), 1.0), cond, uncond, scale)
    x, t = torch.zeros((batch, *base.latent_shape), device=base.device), base.noise_schedule.timesteps(2)[0]
    seconds = min(timed(lambda: denoiser.predictions(x, t), base.device)[0] for _ in range(3))
    images, passes = len(texts) * options.images_per_prompt, 0.0
    for model, run in preference_models(runs).items():
        passes += run.preparation_passes(model, has_cfg(run.config))
    for run in runs:
        cfg = has_cfg(run.config)
        if not run.is_trained:
            passes += step_passes(run.config).of_backbone(cfg).times(run.steps).total
        if not run.is_sampled:
            passes += run.image_passes(cfg).times(images).total
    return passes * seconds / (batch * (1 + base.cfg)) / options.jobs / 3600


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options, description=__doc__)))
