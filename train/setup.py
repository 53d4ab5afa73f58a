"""What a run begins with: an untrained hypernetwork, its schedule, the learning rate, the run's identity."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from hyperalign.checkpoint import Header, HyperAlign
from hyperalign.errors import HyperAlignError
from hyperalign.families.dit import TransformerSpec
from hyperalign.hosts.diffusers.adapter import spec_of
from hyperalign.hypernetwork import HyperNetwork
from hyperalign.schedule import Schedule
from train.config import TrainConfig
from train.materials import Materials
from train.models.fsdp import uses_fsdp
from train.recipe import as_table
from train.relative_distance import base_key_times, measuring_batch
from train.runtime import Row

logger = logging.getLogger("hyperalign.train")

TABLES = ("network", "objective", "optim", "model", "data")
LEFT_OUT = frozenset({
    "model.path", "model.hub", "model.taesd", "model.checkpointing", "objective.micro_batch",
})  # fmt: skip
"""Where things lie and how a step fits the memory: nothing of it changes what a run computes."""
MAY_CHANGE = frozenset({
    "model.vae", "objective.conditional_only", "objective.reward_weight", "objective.preference_weight",
    "optim.lr", "optim.bf16", "data.prompts", "data.preferred", "data.text_lengths",
})  # fmt: skip
"""What changes the loss, and yet may change within a run."""


def new_hyperalign(config: TrainConfig, backbone: nn.Module, schedule: Schedule) -> HyperAlign:
    """Returns an untrained hypernetwork for a base model; it changes nothing yet."""
    spec = spec_of(backbone)
    blocks = config.model.perception_blocks if isinstance(spec, TransformerSpec) else 0
    targets = spec.targets(config.model.mode, blocks)
    network = HyperNetwork(config.network, targets, spec.feature_channels)
    header = Header(
        base=spec.fingerprint(),
        mode=config.model.mode,
        feature_channels=spec.feature_channels,
        targets=targets,
        network=config.network,
        schedule=schedule,
        perception_blocks=blocks,
    )
    return HyperAlign(network, header)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    optim = config.optim
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def schedule_of(
    config: TrainConfig, materials: Materials, accelerator: Accelerator, saved: Row | None
) -> Schedule:
    """Returns the schedule. Key times of P that the recipe leaves open are the state's, or are measured.

    The main process measures for all; a backbone that is spread over the processes needs all of them.
    """
    model, objective = config.model, config.objective
    if model.variant != "P" or model.key_times:
        return config.schedule()
    if saved is not None and "key_times" in saved:
        return Schedule("P", tuple(saved["key_times"]))
    found: list[tuple[float, ...]] = [()]
    if accelerator.is_main_process or uses_fsdp(accelerator):
        batch = measuring_batch(objective.micro_batch)
        found = [base_key_times(materials, count=model.key_count, guidance=objective.guidance, batch=batch)]
        logger.info("key times found on the base model: %s", ", ".join(f"{t:.3f}" for t in found[0]))
    return Schedule("P", tuple(broadcast_object_list(found)[0]))


def identity(config: TrainConfig) -> dict[str, Any]:
    """Returns what a run's numbers depend on, by setting."""
    table = as_table(config)
    chosen = {key: table[key] for key in ("network", "objective", "optim", "model")}
    data = {key: table["data"][key] for key in ("scenes", "seed", "text_lengths")}
    files = {key: _contents(getattr(config.data, key)) for key in ("prompts", "preferred")}
    settings = _by_name(chosen | {"data": data | files, "seed": config.run.seed})
    return {name: value for name, value in settings.items() if name not in LEFT_OUT}


def require_same_run(saved: str, config: TrainConfig) -> list[str]:
    """Compares the identity in a saved state, as JSON, with a recipe's.

    Returns:
        What changed and may change, in words; what only one of the two records counts as the same.

    Raises:
        HyperAlignError: something else changed, which makes another run.
    """
    before, now = _by_name(json.loads(saved)), json.loads(json.dumps(identity(config)))
    changes = {
        name: f"{name} was {before[name]} and is {now[name]}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    }
    others = [words for name, words in changes.items() if name not in MAY_CHANGE]
    if others:
        raise HyperAlignError(
            f"{config.run.out} holds a run of another recipe: {'; '.join(others)}. Choose another --run.out, "
            "delete the folder, or use the recipe it was started with."
        )
    return list(changes.values())


def tell_changes(state: Row, config: TrainConfig, accelerator: Accelerator) -> None:
    """Warns of what changed since a state was saved. Raises HyperAlignError if it is of another run."""
    changes = require_same_run(state["recipe"], config)
    if changes and accelerator.is_main_process:
        logger.warning("The run goes on with changed settings: %s.", "; ".join(changes))
    if state["processes"] != accelerator.num_processes:
        logger.warning(
            "The run was saved by %d processes and goes on with %d: the same in all but the data's order "
            "and the batch, which is objective.prompts and objective.preferred times the processes.",
            state["processes"], accelerator.num_processes,
        )  # fmt: skip


def _by_name(table: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of tables under dotted names; what is no known table stays as it is."""
    names: dict[str, Any] = {}
    for key, value in table.items():
        inner: dict[str, Any] = value if key in TABLES else {}
        names |= {f"{key}.{name}": setting for name, setting in inner.items()} or {key: value}
    return names


def _contents(path: Path) -> str:
    """Returns name and size of a file, or of a folder's shards."""
    if path == Path():
        return "none"
    if not path.exists():
        return path.as_posix()
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return f"{path.as_posix()} ({len(files)} files, {sum(file.stat().st_size for file in files)} bytes)"
