"""Training checkpoints: what a run resumes from, and whether a recipe continues the run that saved one."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line, replacing
from train.config import TrainConfig
from train.methods.settings import TABLES
from train.recipe import as_table

logger = logging.getLogger("hyperalign.train")
Checkpoint = dict[str, Any]
"""Tensors and numbers by name, readable by torch.load without code (weights_only)."""

UNREADABLE = (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError)
"""What torch.load raises at a damaged checkpoint."""
IGNORED = frozenset({
    "model.path", "model.hub", "model.taesd", "model.gradient_checkpointing", "objective.micro_batch",
})  # fmt: skip
"""Locations of files and what fits a step into memory: a run computes the same with any of them."""
MAY_CHANGE = frozenset({
    "model.vae", "objective.conditional_only", "objective.reward_weight", "objective.preference_weight",
    "optim.lr", "optim.steps", "optim.bf16", "data.prompts", "data.preference", "data.text_lengths",
})  # fmt: skip
"""What changes the loss, and may still change within a run."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Returns a training checkpoint on the CPU. Raises HyperAlignError if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise HyperAlignError(
            f"{path} cannot be read as a training checkpoint ({first_line(error)}); expected a whole file "
            "step-NNNNNN.pt of a run's folder `checkpoints`. Give another one."
        ) from error


class TrainingCheckpoints:
    """The last few training checkpoints of a run; a file is written completely or not at all."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, checkpoint: Checkpoint, step: int) -> None:
        """Writes a checkpoint and removes all but the last `keep`. Raises HyperAlignError on a full disk."""
        path = self.folder / f"step-{step:06d}.pt"
        try:
            with replacing(path, durable=True) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            raise HyperAlignError(
                f"The training checkpoint of step {step} cannot be written to {self.folder} "
                f"({first_line(error)}). Free some space and run the same command again: it resumes from the "
                "checkpoint before."
            ) from error
        unfinished = self.folder.glob(".step-*.partial")  # of a process that was killed while it wrote
        for old in (*self._paths()[: -self.keep], *unfinished):
            old.unlink()

    def newest(self) -> Checkpoint | None:
        """Returns the newest checkpoint that can be read, None if there is none.

        Raises:
            HyperAlignError: there are checkpoints, and none of them can be read.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except UNREADABLE as error:
                logger.warning(
                    "%s cannot be read (%s); the checkpoint before it is used.", path, first_line(error)
                )
        if paths:
            raise HyperAlignError(
                f"None of the {len(paths)} training checkpoints in {self.folder} can be read. Restore one "
                "from a copy, or delete the folder to start anew."
            )
        return None

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))


def run_identity(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that decide what a run computes, by dotted name."""
    table, names = as_table(config), ["network", "objective", "optim", "model"]
    if config.objective.method in TABLES:
        names.append(TABLES[config.objective.method])
    settings = {f"{name}.{key}": value for name in names for key, value in table[name].items()}
    own = ("scenes", "seed", "families", "wordings", "text_lengths")
    settings |= {f"data.{key}": table["data"][key] for key in own}
    settings |= {f"data.{key}": _contents(getattr(config.data, key)) for key in ("prompts", "preference")}
    settings["seed"] = config.run.seed
    return {name: value for name, value in settings.items() if name not in IGNORED}


def require_same_run(saved: str, config: TrainConfig) -> list[str]:
    """Compares the identity in a checkpoint, as JSON, with a recipe's.

    Returns:
        Each allowed change as a phrase; a setting that only one of the two has counts as unchanged.

    Raises:
        HyperAlignError: another setting changed, which makes it another run.
    """
    before, now = json.loads(saved), json.loads(json.dumps(run_identity(config)))
    changes = {
        name: f"{name} was {before[name]} and is {now[name]}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    }
    others = [phrase for name, phrase in changes.items() if name not in MAY_CHANGE]
    if others:
        raise HyperAlignError(
            f"{config.run.out} holds a run of another recipe: {'; '.join(others)}. Choose another --run.out, "
            "delete the folder, or use the recipe it was started with."
        )
    return list(changes.values())


def require_continuation(checkpoint: Checkpoint, config: TrainConfig) -> list[str]:
    """Returns each allowed change since a checkpoint, as `require_same_run`.

    Raises:
        HyperAlignError: it is of another run, or has taken more steps than the recipe has.
    """
    changes = require_same_run(checkpoint["identity"], config)
    if config.optim.steps < checkpoint["step"]:
        raise HyperAlignError(
            f"optim.steps is {config.optim.steps}, but the run in {config.run.out} has taken "
            f"{checkpoint['step']} steps; expected as many or more. Raise it, or make a hypernetwork of an "
            "earlier training checkpoint with train/export.py."
        )
    return changes


def announce_changes(checkpoint: Checkpoint, config: TrainConfig, accelerator: Accelerator) -> None:
    """Warns of what changed since a checkpoint. Raises HyperAlignError if it is of another run."""
    changes = require_continuation(checkpoint, config)
    if changes and accelerator.is_main_process:
        logger.warning("The run continues with changed settings: %s.", "; ".join(changes))
    if checkpoint["processes"] != accelerator.num_processes:
        logger.warning(
            "The checkpoint was saved by %d processes and the run continues with %d: the same in all but the "
            "data's order and the batch, which is objective.prompt_batch and objective.preference_batch "
            "times the processes.",
            checkpoint["processes"], accelerator.num_processes,
        )  # fmt: skip


def _contents(path: Path) -> str:
    """Returns name and size of a file, or of a folder's shards."""
    if path == Path():
        return "none"
    if not path.exists():
        return path.as_posix()
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return f"{path.as_posix()} ({len(files)} files, {sum(file.stat().st_size for file in files)} bytes)"
