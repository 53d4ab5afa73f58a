"""log.jsonl: the metrics of each step, one JSON object a line; and the time that a run still takes."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from hyperalign.files import write_text

logger = logging.getLogger("hyperalign.train")
Metrics = dict[str, Any]
"""Numbers of a step or an evaluation, by name; may be nested."""
DECIMALS = 6


class TrainingLog:
    """log.jsonl of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate(self, step: int) -> None:
        """Removes the lines from `step` on: the run takes these steps again."""
        if step == 0 or not self.path.exists():
            self.path.unlink(missing_ok=True)
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        steps = [_step_of(line) for line in lines]
        if None in steps:
            logger.warning("%s: %d broken lines are removed.", self.path, steps.count(None))
        kept = [line for line, found in zip(lines, steps, strict=True) if found is not None and found < step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def append(self, metrics: Metrics) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_rounded(metrics)) + "\n")


def _step_of(line: str) -> int | None:
    """Returns the step of a line of the log, None if the line is incomplete."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}  # pyright: ignore
    return round(value, DECIMALS) if isinstance(value, float) else value


def flat(metrics: Metrics, prefix: str = "") -> dict[str, float]:
    """Returns the numbers of nested metrics under slashed names, as trackers take them."""
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{key}/")  # pyright: ignore
        elif isinstance(value, (int, float)):
            numbers[prefix + key] = float(value)
    return numbers


class TimeLeft:
    """Estimates a run's remaining time from the steps of this process, without its first, a warm-up."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._started: tuple[float, int] | None = None

    def after(self, step: int) -> float | None:
        """Returns the seconds left when `step` steps are done, None after the first of this process."""
        now = time.monotonic()
        if self._started is None:
            self._started = (now, step)
            return None
        start, first = self._started
        return (now - start) / (step - first) * (self.steps - step)
