"""The training loop of every part of the tiny model: resuming, EMA, log, progress."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hyperalign.files import replacing
from train.tiny.art import PACKAGES

Part = TypeVar("Part", bound=nn.Module)
LossFn = Callable[[int], dict[str, Tensor]]
"""Step number -> named losses, whose sum is minimised. It depends on the step alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The training settings of one part."""

    name: str
    steps: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.0
    """Decay of the weight average that is returned; 0 returns the last weights."""
    clip: float = 1.0
    save_every: int = 200


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """Folders of a build of the tiny model, and its size."""

    runs: Path
    """Logs and training checkpoints of unfinished parts."""
    weights: Path
    """Finished parts."""
    share: float = 1.0
    """Share of each stage's steps and scenes; a share below 1 only tests the build."""

    def scaled(self, count: int) -> int:
        """Returns the share of `count` steps or scenes."""
        return max(2, round(count * self.share))

    def header(self, details: dict[str, Any]) -> dict[str, Any]:
        """Returns the header of a finished part."""
        return {"script": "train/tiny/build.py", "share": self.share, "art": PACKAGES, **details}


def learning_rate(step: int, fit: Fit) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < fit.warmup:
        return fit.lr * (step + 1) / fit.warmup
    progress = (step - fit.warmup) / max(1, fit.steps - fit.warmup)
    return fit.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def run_fit(fit: Fit, module: Part, losses_of: LossFn, settings: BuildSettings) -> Part:
    """Trains `module` in place, resuming where it stopped, and returns its average (or itself)."""
    run_dir, fit = settings.runs, replace(fit, steps=settings.scaled(fit.steps))
    run_dir.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(module) if fit.ema else module
    optimiser = torch.optim.AdamW(module.parameters(), fit.lr, (0.9, 0.98), weight_decay=fit.weight_decay)
    state_path = run_dir / f"{fit.name}.state.pt"
    first = _resume(state_path, module, average, optimiser)
    started = time.monotonic()
    with (run_dir / f"{fit.name}.jsonl").open("a", encoding="utf-8") as log:
        for step in tqdm(
            range(first, fit.steps), desc=fit.name, initial=first, total=fit.steps, mininterval=5
        ):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, fit)
            losses = losses_of(step)
            torch.stack(list(losses.values())).sum().backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), fit.clip)
            optimiser.step()
            optimiser.zero_grad()
            if fit.ema:
                _average(average, module, min(fit.ema, (step + 1) / (step + 10)))
            row = {key: round(float(value.detach()), 5) for key, value in losses.items()}
            row |= {
                "step": step,
                "grad_norm": round(float(norm), 4),
                "seconds": round(time.monotonic() - started, 1),
            }
            log.write(json.dumps(row) + "\n")
            if (step + 1) % fit.save_every == 0 or step + 1 == fit.steps:
                log.flush()
                _save(state_path, step + 1, module, average, optimiser)
    return average.eval()


@torch.no_grad()
def _average(average: nn.Module, module: nn.Module, decay: float) -> None:
    for mean, value in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(value, 1.0 - decay)
    for mean, value in zip(average.buffers(), module.buffers(), strict=True):
        mean.copy_(value)


def _save(
    path: Path, step: int, module: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    state = {
        "step": step,
        "module": module.state_dict(),
        "average": average.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    with replacing(path) as partial:
        torch.save(state, partial)


def _resume(path: Path, module: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])
