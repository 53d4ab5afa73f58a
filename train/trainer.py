"""The training loop: rollout, two backward passes, one averaged step; resumable at any point."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hyperalign import checkpoint, provenance
from hyperalign.card import write_card
from hyperalign.checkpoint import HyperAlign
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.adapter import Adapter
from train.config import TrainConfig
from train.materials import Materials
from train.models.base import cfg_conditions
from train.models.fsdp import uses_fsdp
from train.objective import States, noised_states, preference_loss, reward_loss, rollout_states
from train.randomness import Draws, normal, times
from train.recipe import as_table
from train.rollout import rollout
from train.runtime import Clock, Log, Row, SavedStates, Stopped, StopRequest, flat
from train.setup import identity, learning_rate, new_hyperalign, schedule_of, tell_changes

logger = logging.getLogger("hyperalign.train")


class Trainer:
    """One training run in one folder.

    Everything random in a step is drawn from (seed, step) for all processes together, so a resumed
    run continues the exact loss curve, and there is no random state to save. A step counts whole or not
    at all: what ends one early saves the state before it, and what tears the optimiser's own step saves
    nothing, so that the last saved state stands.
    """

    def __init__(
        self, config: TrainConfig, materials: Materials, accelerator: Accelerator | None = None
    ) -> None:
        """Makes a new hypernetwork or resumes the run in `run.out`. Raises HyperAlignError."""
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.config = config
        self.accelerator = accelerator or Accelerator()
        self.device = self.accelerator.device
        self.materials = materials
        self.base = materials.base
        self._states = SavedStates(config.run.out / "states", config.run.keep)
        saved = self._states.newest()
        if saved is not None:
            tell_changes(saved, config, self.accelerator)
        torch.manual_seed(config.run.seed)
        self.schedule = schedule_of(config, materials, self.accelerator, saved)
        self.hyperalign = new_hyperalign(config, self.base.backbone, self.schedule)
        self.network = self.hyperalign.network.to(self.device)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.adapter = Adapter(self.base.backbone, self.hyperalign)
        if config.model.recomputes_backbone and config.model.base != "tiny":
            self.adapter.checkpoint_activations()
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), config.optim.lr, (0.9, 0.99), weight_decay=config.optim.weight_decay
        )
        self.step = self.images_seen = self.skipped = self._skipped_in_a_row = 0
        config.run.out.mkdir(parents=True, exist_ok=True)
        self._identity = json.dumps(identity(config))
        self._figures: Row = {}
        self._unlogged: Row = {}  # of the last step, until it is evaluated and logged
        self._drawn = 0  # images of the step that is under way
        self._between_steps = True  # while it is not, the weights are of no step
        self._log = Log(config.run.out / "log.jsonl")
        if saved is not None:
            self._load(saved)
        if self.accelerator.is_main_process:
            self._log.truncate(self.step - bool(self._unlogged))

    @property
    def path(self) -> Path:
        """Where the finished hypernetwork goes."""
        return self.config.run.out / "hypernetwork.safetensors"

    def averaged(self) -> HyperAlign:
        """Returns the averaged hypernetwork: what is evaluated and saved."""
        return HyperAlign(self.average, self.hyperalign.header)

    def fit(self, on_step: Callable[[Row], None] | None = None) -> None:
        """Trains to the last step; on interruption the state is saved and the exception goes on.

        Raises:
            Stopped: SIGTERM or Ctrl-C came.
            KeyboardInterrupt: Ctrl-C came twice.
            HyperAlignError: the gradients stay infinite, the disk is full, or another process failed.
        """
        clock, stop = Clock(self.config.optim.steps), StopRequest()
        try:
            with stop.listening():
                while self._unlogged or self.step < self.config.optim.steps:
                    if not self._unlogged:
                        self._unlogged = self._train_step()
                        self._unlogged["seconds_left"] = clock.left(self.step)
                        self._between_steps = True
                    if self._is_evaluated() or self.step % self.config.run.save_every == 0:
                        self._save_state()
                    if self._is_evaluated():
                        self._end_if(stop.received)
                        with stop.immediate():
                            self._unlogged |= self._evaluate()
                    self._report(on_step)
                    self._end_if(stop.received)
        finally:
            if self._between_steps:
                self._save_state()
        self.export()
        self.accelerator.end_training()

    def _end_if(self, asked: bool) -> None:
        """Raises Stopped if any process was asked to end."""
        if self._any_process(asked):
            raise Stopped

    def _report(self, on_step: Callable[[Row], None] | None) -> None:
        row = self._unlogged
        if self.accelerator.is_main_process:
            self._log.append(row)
        self._unlogged = {}
        if self.accelerator.is_main_process and on_step is not None:
            on_step(row)
        self.accelerator.log(flat(row), step=row["step"])

    def export(self) -> Path:
        """Writes the averaged hypernetwork with a header that says how it was made, and its model card."""
        recipe = as_table(self.config, paths=False) | {"run": {"seed": self.config.run.seed}}
        origin = {**self.materials.origin, "metrics": self._figures}
        training = {"steps": self.step, **origin, "recipe": recipe}
        header = dataclasses.replace(self.hyperalign.header, training=training, sources=self._sources())
        if self.accelerator.is_main_process:
            checkpoint.save(self.path, self.average, header)
            write_card(self.path, header)
        return self.path

    def _sources(self) -> tuple[provenance.Source, ...]:
        """Returns what shaped the hypernetwork, with licences and known biases."""
        o, model = self.config.objective, self.config.model
        data = self.materials.origin.get("preference_data", "")
        return provenance.sources(model.base, o.rewards if o.reward_weight else {}, data, model.hub)

    def _draws(self) -> Draws:
        accelerator = self.accelerator
        return Draws(self.config.run.seed, self.step, accelerator.process_index, accelerator.num_processes)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        full = next(self.base.backbone.parameters()).dtype == torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.optim.bf16 and full)

    def _train_step(self) -> Row:
        """Takes a step; only its end changes what a state holds."""
        started = time.monotonic()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self._drawn = 0
        self.optimiser.zero_grad()
        row: Row = {"step": self.step} | self._passes() | self._apply_gradient()
        seconds = time.monotonic() - started
        return row | {"seconds": seconds} | self._speed(seconds)

    def _passes(self) -> Row:
        """Adds up the gradients of both losses; returns the metrics.

        A process that fails tells the others where they meet next, so that none waits for it in vain.
        With a backbone spread over them they meet in each pass, and the launcher ends them.
        """
        row: Row = {}
        failure: Exception | None = None
        try:
            if self.config.objective.reward_weight:
                row |= self._reward_pass()
            if self.config.objective.preference_weight:
                row |= self._preference_pass()
        except Exception as error:
            if self.accelerator.num_processes == 1 or uses_fsdp(self.accelerator):
                raise
            failure = error
        if not self._any_process(failure is not None):
            return row | self._mean({name: row[name] for name in row if name != "grad_norm_reward"})
        raise failure or HyperAlignError(
            f"Another process failed in step {self.step}; it says why. Run the same command again to go on."
        )

    def _speed(self, seconds: float) -> Row:
        o, processes = self.config.objective, self.accelerator.num_processes
        rewarded = o.prompts * o.timesteps * bool(o.reward_weight)
        learned = o.preferred * bool(o.preference_weight)
        row: Row = {"images_per_second": (rewarded + learned) * processes / seconds}
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return row

    def _reward_pass(self) -> Row:
        """L_R through one step from states of a rollout, of noised images, or of both (Eq 8)."""
        o = self.config.objective
        kind = o.state if o.state != "mixed" else ("rollout", "noised")[self.step % 2]
        states = self._rollout_states() if kind == "rollout" else self._noised_states()
        totals: dict[str, float] = {}
        for rows, share in self._parts(len(states)):
            with self._autocast():
                loss, scores = reward_loss(
                    self.adapter, self.base, self.materials.rewards, states.rows(rows), guidance=o.guidance,
                    cap=o.reward_cap, conditional_only=o.conditional_only,
                )  # fmt: skip
            self.accelerator.backward(o.reward_weight * share * loss)
            for name, value in {"reward_loss": loss, **scores}.items():
                totals[name] = totals.get(name, 0.0) + share * value.mean().item()
        return {**totals, "grad_norm_reward": self._gradient_norm()}

    def _rollout_states(self) -> States:
        o, draws = self.config.objective, self._draws()
        rng = draws.generator(1)
        processes = self.accelerator.num_processes
        own = draws.part(o.prompts)
        prompts = self.materials.prompts.draw(o.prompts * processes, rng)[own]
        noise = normal((o.prompts * processes, *self.base.latent_shape), rng)[own].to(self.device)
        choices = np.arange(o.skip_first, o.rollout_steps)
        picks = sorted(rng.choice(choices, o.timesteps, replace=False).tolist())
        cond, uncond = cfg_conditions(self.base, self.materials.texts, prompts)
        with self._autocast():
            path = rollout(
                self.base, self.adapter, self.schedule, cond, uncond, noise,
                steps=o.rollout_steps, guidance=o.guidance, until=max(picks) + 1,
            )  # fmt: skip
        return rollout_states(path, picks, cond, uncond, prompts)

    def _noised_states(self) -> States:
        o = self.config.objective
        x0, noise, u_B, captions = self._images(o.prompts * o.timesteps, o.reward_range, purpose=3)
        cond, uncond = cfg_conditions(self.base, self.materials.texts, captions)
        t_B = self.base.process.at(u_B)
        return noised_states(self.base, self.schedule, x0, noise, t_B, cond, uncond, captions)

    def _preference_pass(self) -> Row:
        """L_G on noised preference images (Eq 9)."""
        o = self.config.objective
        x0, noise, u_B, captions = self._images(
            o.preferred, o.preferred_range, purpose=2, drop=o.drop_caption
        )
        cond = self.materials.texts.conditions(captions)
        states = noised_states(
            self.base, self.schedule, x0, noise, self.base.process.at(u_B), cond, None, captions
        )
        total = 0.0
        for rows, share in self._parts(len(states)):
            with self._autocast():
                loss = preference_loss(
                    self.adapter, self.base, x0[rows], noise[rows], states.rows(rows), o.snr_cap
                )
            self.accelerator.backward(o.preference_weight * share * loss)
            total += share * loss.item()
        return {"preference_loss": total}

    def _images(
        self, rows: int, bounds: tuple[float, float], purpose: int, drop: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Returns this process's latents, noise, times u and captions of preference images."""
        preferred = self.materials.preferred
        if preferred is None:
            raise HyperAlignError("The run needs preference images; set data.preferred.")
        draws, whole = self._draws(), rows * self.accelerator.num_processes
        rng, own = draws.generator(purpose), draws.part(rows)
        x0, captions = preferred.batch(self.images_seen + self._drawn, whole, rng, own)
        self._drawn += whole
        chances = rng.random((whole,))[own] if drop else np.ones(rows)
        u_B = times(whole, bounds, self.config.objective.time_law, rng)[own]
        noise = normal((whole, *self.base.latent_shape), rng)[own]
        kept = ["" if chance < drop else text for text, chance in zip(captions, chances, strict=True)]
        return x0.to(self.device), noise.to(self.device), u_B.to(self.device), kept

    def _parts(self, rows: int) -> Iterator[tuple[slice, float]]:
        """Yields the slices of backward passes with their shares of the batch."""
        size = self.config.objective.micro_batch or rows
        for first in range(0, rows, size):
            last = min(first + size, rows)
            yield slice(first, last), (last - first) / rows

    def _mean(self, metrics: dict[str, float]) -> Row:
        """Returns the metrics averaged over processes."""
        if self.accelerator.num_processes == 1:
            return dict(metrics)
        means = self._reduce(torch.tensor(list(metrics.values()), device=self.device))
        return dict(zip(metrics, means.tolist(), strict=True))

    def _any_process(self, holds: bool) -> bool:
        return self._mean({"any": float(holds)})["any"] > 0

    def _reduce(self, values: Tensor) -> Tensor:
        reduced = self.accelerator.reduce(values, reduction="mean")
        if not isinstance(reduced, Tensor):
            raise HyperAlignError(f"Accelerate returned a {type(reduced).__name__} for a reduced tensor.")
        return reduced

    def _gradient_norm(self) -> float:
        grads = [p.grad for p in self.network.parameters() if p.grad is not None]
        return float(torch.stack([g.norm() for g in grads]).norm()) if grads else 0.0

    def _apply_gradient(self) -> Row:
        """Ends the step, with one of the optimiser if the gradient is finite. Raises HyperAlignError."""
        norm = self._synchronised_gradient_norm()
        finite = bool(torch.isfinite(norm))
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= self.config.optim.bad_steps:
            raise HyperAlignError(
                f"The gradient was not finite for {self._skipped_in_a_row} steps in a row, up to step "
                f"{self.step}. Lower optim.lr or objective.reward_weight and run the command again: it goes "
                "on from the last state."
            )
        self._between_steps = False
        if finite:
            self.optimiser.step()
            self._update_average()
        self.skipped += not finite
        self.images_seen += self._drawn
        self.step += 1
        self.optimiser.zero_grad()
        return {"grad_norm": float(norm), "skipped": not finite, "skipped_in_all": self.skipped}

    def _synchronised_gradient_norm(self) -> Tensor:
        """Averages gradients over processes in one flat reduction, clips, returns the norm.

        The two losses are several backward passes; a DistributedDataParallel wrapper would reduce in
        each of them and trip over parameters that one pass does not use.
        """
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            grads = [p.grad for p in parameters if p.grad is not None]
            reduced = self._reduce(torch.cat([g.flatten() for g in grads]))
            for grad, mean in zip(grads, reduced.split([g.numel() for g in grads]), strict=True):
                grad.copy_(mean.view_as(grad))
        return nn.utils.clip_grad_norm_(parameters, self.config.optim.clip)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.optim.ema, (self.step + 1) / (self.step + 10))
        for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(value, 1.0 - decay)

    def _is_evaluated(self) -> bool:
        every = self.config.eval.every
        return bool(every) and (self.step % every == 0 or self.step == self.config.optim.steps)

    def _evaluate(self) -> Row:
        grid = self.config.run.out / "grids" / f"{self.step:05d}.png"
        metrics = self.materials.evaluate(self.averaged(), grid)
        self._figures = flat(metrics)
        return {"validation": metrics}

    def _save_state(self) -> None:
        """Saves everything a run is; it is the same in every process, so the main one writes it."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "images_seen": self.images_seen,
            "skipped": self.skipped,
            "metrics": self._figures,
            "unlogged": self._unlogged,
            "key_times": list(self.schedule.key_times),
            "processes": self.accelerator.num_processes,
            "recipe": self._identity,
        }
        self._states.save(state, self.step)

    def _load(self, state: Row) -> None:
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.images_seen = int(state["step"]), int(state["images_seen"])
        self.skipped = int(state["skipped"])
        self._figures = state.get("metrics", {})
        self._unlogged = state.get("unlogged", {})
