"""The hypernetworks that a run writes: one of each validation, the best of them, and the finished one."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperalign import checkpoint, provenance
from hyperalign.card import write_card
from hyperalign.checkpoint import Header
from hyperalign.files import cannot_write, write_text
from hyperalign.hypernetwork import HyperNetwork
from train.config import TrainConfig
from train.log import Metrics, flat
from train.methods.settings import TABLES
from train.recipe import as_table
from train.start import Origin, origin_of

logger = logging.getLogger("hyperalign.train")
FULL_DISK = "Free some space and run the same command again: it resumes from the last training checkpoint."


def deciding_rewards(config: TrainConfig) -> dict[str, float]:
    """Returns the validation figures that decide which weights are the best, with their weights in the sum.

    Those of rewards that no loss optimises, since an optimised one rises even where images get worse; of all
    rewards if the recipe measures no other.
    """
    if config.model.base == "tiny":
        return {"validation_reward": 1.0}
    rewards, optimised = config.validation.rewards, config.objective.optimised
    measured = {name: weight for name, weight in rewards.items() if weight and name not in optimised}
    return measured or {**config.objective.rewards, **rewards}


def gain_over_base(metrics: Metrics, base: Metrics, weights: Mapping[str, float]) -> float | None:
    """Returns sum_i w_i (mean_i - base's mean_i) / base's spread_i: rewards of any scale count alike.

    The spread is the standard deviation of a reward over the base model's images; 1 where it is 0. None where
    one of the figures is missing.
    """
    if not all(name in metrics and name in base for name in weights):
        return None
    spread: Mapping[str, float] = base.get("spread", {})
    return sum(
        weight * (metrics[name] - base[name]) / (spread.get(name) or 1.0) for name, weight in weights.items()
    )


class Results:
    """The files of hypernetworks in run.out, and the figures that decide which is the best."""

    def __init__(self, config: TrainConfig, header: Header, facts: Mapping[str, str]) -> None:
        """Writes nothing yet.

        Args:
            config: the recipe.
            header: of the hypernetwork, without its training.
            facts: rewards and preference dataset, for the header.
        """
        self.config, self._header, self._facts = config, header, facts
        self.origin: Origin | None = None
        self.validated: Metrics = {}  # of the last validation
        self.conditioning: Metrics = {}  # `shares` and, after the last step, `gain` of that validation
        self.baseline: Metrics = {}  # `metrics` of the base model, and the `step` before which it was sampled
        self.best: Metrics = {}  # `step` and `gain` of the best validated weights

    @property
    def path(self) -> Path:
        """The file of the finished hypernetwork."""
        return self.config.run.out / "hypernetwork.safetensors"

    @property
    def best_path(self) -> Path:
        """The file of the best hypernetwork so far."""
        return self.config.run.out / "hypernetwork-best.safetensors"

    def step_path(self, step: int) -> Path:
        """Returns the file of the hypernetwork that was validated after so many steps."""
        return self.config.run.out / f"hypernetwork-step-{step:06d}.safetensors"

    def keep(self, network: HyperNetwork, step: int, metrics: Metrics) -> Metrics:
        """Writes validated weights, also as the best if they are, and removes older ones.

        Returns:
            The lines of the log: the validation with its gain over the base model, and the best so far.

        Raises:
            HyperAlignError: the disk refuses.
        """
        gain = gain_over_base(metrics, self.baseline.get("metrics", {}), deciding_rewards(self.config))
        if gain is not None:
            metrics = metrics | {"gain": gain}
        self.conditioning = metrics.get("conditioning", {})
        self.validated = flat({name: value for name, value in metrics.items() if name != "conditioning"})
        is_best = gain is not None and math.isfinite(gain) and gain >= self.best.get("gain", -math.inf)
        if is_best:
            self.best = {"step": step, "gain": gain}
        if self.config.run.keep_exports:
            self._save(self.step_path(step), network, step)
        self._remove_older(step)
        if is_best:
            self._save(self.best_path, network, step)
            self._write_best()
        return {"validation": metrics} | ({"best": self.best} if self.best else {})

    def finish(self, network: HyperNetwork, step: int) -> Path:
        """Writes the finished hypernetwork with its model card. Raises HyperAlignError on a full disk."""
        self._save(self.path, network, step)
        write_card(self.path, self.header(step))
        return self.path

    def header(self, step: int) -> Header:
        """Returns the header of the weights after so many steps, with their provenance."""
        recipe = as_table(self.config, paths=False) | {"run": {"seed": self.config.run.seed}}
        recipe = {name: table for name, table in recipe.items() if name not in self._of_other_methods()}
        training: dict[str, Any] = {"steps": step, **self._facts, "metrics": self.validated, "recipe": recipe}
        if self.conditioning:
            training["conditioning"] = self.conditioning
        if self.baseline:
            training["baseline"] = flat(self.baseline["metrics"])
        if self.best:
            training["best"] = self.best
        if self.origin is not None:
            training["init_from"] = self.origin.facts
        return dataclasses.replace(self._header, training=training, sources=self._sources())

    def _of_other_methods(self) -> set[str]:
        """Returns the recipe's tables that the run's method does not read."""
        return set(TABLES.values()) - {TABLES.get(self.config.objective.method)}

    def baseline_of(self, step: int) -> Metrics:
        """Returns the line of the log about the base model, in the row of the step that came next."""
        return {"baseline": self.baseline["metrics"]} if self.baseline.get("step") == step else {}

    def state(self) -> dict[str, Any]:
        """Returns what a training checkpoint holds of it."""
        return {
            "metrics": self.validated,
            "conditioning": self.conditioning,
            "baseline": self.baseline,
            "best": self.best,
            "validation": self._settings(),
            "origin": None if self.origin is None else self.origin.as_table(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes over what a training checkpoint holds; figures of another validation are not comparable."""
        self.validated, self.conditioning = saved.get("metrics", {}), saved.get("conditioning", {})
        self.origin = origin_of(saved["origin"]) if saved.get("origin") else None
        if saved.get("validation", self._settings()) == self._settings():
            self.baseline, self.best = saved.get("baseline", {}), saved.get("best", {})
        elif saved.get("baseline"):
            logger.warning(
                "The settings of the validation changed: the base model is validated again, and the best "
                "weights are chosen among those to come."
            )

    def _settings(self) -> str:
        """Returns the settings that validations must share to be compared."""
        settings = as_table(self.config)["validation"]
        return json.dumps({name: value for name, value in settings.items() if name != "every"})

    def _save(self, path: Path, network: HyperNetwork, step: int) -> None:
        with cannot_write(path, FULL_DISK):
            checkpoint.save(path, network, self.header(step))

    def _remove_older(self, step: int) -> None:
        """Removes all but the last `run.keep_exports` validated hypernetworks up to this step."""
        written = sorted(self.config.run.out.glob("hypernetwork-step-*.safetensors"))
        past = [path for path in written if path.name <= self.step_path(step).name]
        for path in past[: max(0, len(past) - self.config.run.keep_exports)]:
            path.unlink(missing_ok=True)

    def _write_best(self) -> None:
        """Writes the card of the best weights and, in best.json, why they are the best."""
        report = {
            **self.best,
            "file": self.best_path.name,
            "decided_by": deciding_rewards(self.config),
            "metrics": self.validated,
            "baseline": flat(self.baseline["metrics"]),
        }
        write_card(self.best_path, self.header(self.best["step"]))
        path = self.config.run.out / "best.json"
        with cannot_write(path, FULL_DISK):
            write_text(path, json.dumps(report, indent=1) + "\n")

    def _sources(self) -> tuple[provenance.Source, ...]:
        """Returns the models and datasets behind the weights, with licences and known biases."""
        config, data = self.config, self._facts.get("preference_data", "")
        own = provenance.sources(config.model.base, config.objective.optimised, data, config.model.hub)
        names = {(source.kind, source.name) for source in own}
        inherited = () if self.origin is None else self.origin.sources
        return (*own, *(source for source in inherited if (source.kind, source.name) not in names))
