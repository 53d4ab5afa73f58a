"""Runs of a few steps on the embedded model, their logs, and what ends them: work for `in_processes`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.schedule import Variant
from hyperalign.targets import PerceptionMode
from train import relative_distance
from train.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)
from train.inputs import load_inputs
from train.methods import hyperalign as losses
from train.methods.settings import GrpoConfig, MethodName, SpoConfig
from train.recipe import load_recipe
from train.train import run
from train.trainer import Trainer

ROOT = Path(__file__).parents[2]


def small(
    out: Path, variant: Variant = "S", mode: PerceptionMode = "prefix", bf16: bool = False, **network: Any
) -> TrainConfig:
    keys = (0.6,) if variant == "P" else ()
    return TrainConfig(
        model=ModelConfig(variant=variant, mode=mode, key_times=keys, statistics_prompts=2),
        network=HyperNetworkConfig(**({"layers": 1} | network)),
        objective=ObjectiveConfig(prompt_batch=2, rollout_steps=3, timesteps=1, preference_batch=4),
        optim=OptimConfig(steps=4, warmup_steps=2, lr=1e-2, bf16=bf16),
        data=DataConfig(scenes=16, cache=ROOT / "build" / "tiny"),
        validation=ValidationConfig(every=0),
        run=RunConfig(out=out, checkpoint_every=2),
    )


def of_method(method: MethodName, out: Path, variant: Variant = "S", **objective: Any) -> TrainConfig:
    """Returns a run of a training method whose settings fit a few samples."""
    found = small(out, variant)
    return dataclasses.replace(
        found,
        objective=dataclasses.replace(found.objective, method=method, **{"rollout_steps": 4} | objective),
        optim=dataclasses.replace(found.optim, steps=3, lr=1e-4),
        run=dataclasses.replace(found.run, checkpoint_every=1),
        grpo=GrpoConfig(group=4, updates=2, clip_range=0.2, window=2, window_interval=1),
        srpo=dataclasses.replace(found.srpo, positive=("{}",), negative=("a drawing of {}",)),
        spo=SpoConfig(candidates=3, threshold=0.0, updates=1),
        dpo=dataclasses.replace(found.dpo, beta=50.0),
        kto=dataclasses.replace(found.kto, beta=50.0),
    )


def trainer(config: TrainConfig) -> Trainer:
    accelerator = Accelerator(cpu=True)
    return Trainer(config, load_inputs(config, accelerator), accelerator)


def curve(out: Path) -> list[dict[str, Any]]:
    """Returns the log of a run without what a clock decides."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    timings = ("seconds", "seconds_left", "images_per_second")
    return [{key: value for key, value in row.items() if key not in timings} for row in rows]


def killed_in_a_save(out: Path) -> None:
    """Dies of SIGKILL when half of the last checkpoint is written."""
    trains = trainer(small(out))
    whole = torch.save

    def dies_halfway(state: dict[str, Any], file: Any) -> None:
        whole(state, file)
        if state["step"] == 4:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dies_halfway
    trains.fit()


def one_of_two_fails(out: Path) -> int:
    """Finds key times and trains; the second process fails in the third step."""
    recipe = load_recipe(ROOT / "train" / "recipes" / "tiny_p.toml")
    short = {"prompt_batch": 2, "rollout_steps": 3, "timesteps": 1, "skip_first": 1, "preference_batch": 2}
    config = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, key_times=(), key_count=1, statistics_prompts=2),
        objective=dataclasses.replace(recipe.objective, **short),
        optim=dataclasses.replace(recipe.optim, steps=9, bf16=False),
        data=dataclasses.replace(recipe.data, scenes=16),
        validation=dataclasses.replace(recipe.validation, every=0),
        run=dataclasses.replace(recipe.run, out=out, checkpoint_every=100, init_from=Path()),
    )
    accelerator = Accelerator()
    search, loss = relative_distance.base_key_times, losses.preference_loss

    def measured(*given: Any, **named: Any) -> Any:
        (out / f"measured-{accelerator.process_index}").touch()
        return search(*given, **named | {"steps": 8, "prompts": 2})

    def fails(*given: Any) -> Any:
        if trains.step == 2 and accelerator.process_index == 1:
            raise RuntimeError("this process is broken")
        return loss(*given)

    relative_distance.base_key_times, losses.preference_loss = measured, fails
    out.mkdir(parents=True, exist_ok=True)
    trains = Trainer(config, load_inputs(config, accelerator), accelerator)
    (out / f"times-{accelerator.process_index}").write_text(str(trains.schedule.key_times))
    return run(trains)
