"""The training loop: a step is a rollout, two backward passes and one averaged update of the network.

A run can be stopped at any point and resumes exactly.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hyperalign.checkpoint import HyperAlign, header_text
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.adapter import Adapter
from train.checkpoints import Checkpoint, TrainingCheckpoints, announce_changes, run_identity
from train.config import TrainConfig
from train.inputs import RunInputs
from train.log import Metrics, TimeLeft, TrainingLog, flat
from train.methods.passes import step_passes
from train.methods.step import Step, StepMetrics
from train.methods.table import METHODS
from train.models.fsdp import uses_fsdp
from train.models.kernels import attention_kernels
from train.processes import any_process, average_gradients, mean_metrics
from train.relative_distance import weight_schedule
from train.results import Results
from train.start import begin_from, new_hyperalign
from train.statistics import measure_statistics
from train.stopping import Stopped, StopRequest

logger = logging.getLogger("hyperalign.train")
GIB = 2**30


class Trainer:
    """One training run in one folder.

    All random numbers of a step are decided by (seed, step) for all processes together, so a resumed run
    continues the exact loss curve, and no random state is saved. A step is taken completely or not at all: an
    exception before the optimiser's update saves the checkpoint of the step before, and one during the update
    saves nothing, so that the last checkpoint remains.
    """

    def __init__(
        self, config: TrainConfig, inputs: RunInputs, accelerator: Accelerator | None = None
    ) -> None:
        """Makes a new hypernetwork or resumes the run in `run.out`. Raises HyperAlignError."""
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.config, self.inputs, self.base = config, inputs, inputs.base
        self.accelerator = accelerator or Accelerator()
        self.device = self.accelerator.device
        self._checkpoints = TrainingCheckpoints(config.run.out / "checkpoints", config.run.keep_checkpoints)
        saved = self._checkpoints.newest()
        if saved is not None:
            announce_changes(saved, config, self.accelerator)
        torch.manual_seed(config.run.seed)
        self.schedule = weight_schedule(config, inputs, self.accelerator, (saved or {}).get("key_times"))
        self.hyperalign = new_hyperalign(config, self.base.backbone, self.schedule)
        self.results = Results(config, self.hyperalign.header, inputs.provenance)
        if saved is None and config.run.init_from != Path():
            self.results.origin = begin_from(config.run.init_from, self.hyperalign)
        self.network = self.hyperalign.network.to(self.device)
        self.adapter = Adapter(self.base.backbone, self.hyperalign)
        if saved is None and config.run.init_from == Path():
            with self._autocast():
                measure_statistics(inputs, self.adapter, config, self.accelerator)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        if config.model.recomputes_backbone and config.model.base != "tiny":
            self.adapter.checkpoint_activations()
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), config.optim.lr, (0.9, 0.99), weight_decay=config.optim.weight_decay,
            fused=self.device.type == "cuda",
        )  # fmt: skip
        self._method = METHODS[config.objective.method]
        self._micro_batch = config.objective.images_at_once
        self._is_halved = False
        self.step = self.images_seen = self.skipped = self._skipped_in_a_row = 0
        config.run.out.mkdir(parents=True, exist_ok=True)
        self._identity = json.dumps(run_identity(config))
        self._unlogged: Metrics = {}  # of the last step, until it is validated and logged
        self._images_read = 0  # in the current step
        self._between_steps = True  # False during the update, when the weights belong to no step
        self._log = TrainingLog(config.run.out / "log.jsonl")
        if saved is not None:
            self._resume(saved)
        if self.accelerator.is_main_process:
            self._log.truncate(self.step - bool(self._unlogged))

    # ---------------------------------------------------------------------------------------------- one step

    def _train_step(self) -> Metrics:
        """Takes a step; only its end changes what a checkpoint holds."""
        started = time.monotonic()
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.optim.learning_rate(self.step)
        metrics: Metrics = {"step": self.step} | self.results.baseline_of(self.step)
        with attention_kernels(self.config.run.attention_kernels, self.device):
            for measured in self._updates():
                metrics |= self._apply_gradient(measured)
        self.images_seen += self._images_read
        self.step += 1
        seconds = time.monotonic() - started
        return metrics | {"seconds": seconds} | self._speed(seconds)

    def _updates(self) -> Iterator[StepMetrics]:
        """Yields the metrics of each update, averaged over the processes, when its gradient is complete.

        A process that fails reports it at the next exchange, so that the others do not wait for it. With a
        sharded backbone the processes exchange in each pass, and the launcher ends them.
        """
        taken, step = 0, self._new_step()
        updates = self._method(step)
        while True:
            self.optimiser.zero_grad()
            metrics: StepMetrics | None = None
            failure: Exception | None = None
            try:
                metrics = next(updates, None)
            except Exception as error:
                if uses_fsdp(self.accelerator):
                    raise
                failure = error
            if any_process(failure is not None, self.accelerator):
                if taken or not self._may_go_on(failure):
                    raise failure or self._failure_elsewhere()
                failure = None  # its traceback holds on to activations
                step = self._new_step()
                updates = self._method(step)
                continue
            if metrics is None:
                return
            shared = {name: value for name, value in metrics.items() if not name.startswith("grad_norm_")}
            self._images_read = step.images_read
            yield metrics | mean_metrics(shared, self.accelerator)
            taken += 1

    def _new_step(self) -> Step:
        return Step(
            self.config, self.inputs, self.adapter, self.schedule, self.accelerator, self.step,
            self.images_seen, self._micro_batch,
        )  # fmt: skip

    def _may_go_on(self, failure: Exception | None) -> bool:
        """Returns whether the memory was full in whatever process failed, and the passes could be halved."""
        out_of_memory = failure is None or isinstance(failure, torch.cuda.OutOfMemoryError)
        return not any_process(not out_of_memory, self.accelerator) and self._halve_micro_batch()

    def _failure_elsewhere(self) -> HyperAlignError:
        return HyperAlignError(
            f"Another process failed in step {self.step} and reports the reason. Run the same command again "
            "to resume."
        )

    def _halve_micro_batch(self) -> bool:
        """Halves the backward passes, once in a run, and says so; returns whether it could."""
        largest = step_passes(self.config).largest_batch
        before = min(self._micro_batch or largest, largest)
        if self._is_halved or before == 1:
            return False
        self._micro_batch, self._is_halved = before // 2, True
        if self.accelerator.is_main_process:
            logger.warning(
                "The GPU's memory was full in step %d: the run goes on with %d images in one backward pass "
                "instead of %d, and computes the same. Write objective.micro_batch = %d into the recipe.",
                self.step, self._micro_batch, before, self._micro_batch,
            )  # fmt: skip
        return True

    def _apply_gradient(self, measured: dict[str, Tensor]) -> Metrics:
        """Updates the network if the gradient is finite; returns the update's metrics as numbers.

        Raises HyperAlignError.
        """
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        average_gradients(parameters, self.accelerator)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.optim.max_grad_norm)
        measured = measured | {"grad_norm": norm}
        values = torch.stack([value.float() for value in measured.values()]).tolist()
        metrics: Metrics = dict(zip(measured, values, strict=True))
        finite = math.isfinite(metrics["grad_norm"])
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= self.config.optim.bad_steps:
            raise HyperAlignError(
                f"The gradient was not finite for {self._skipped_in_a_row} steps in a row, up to step "
                f"{self.step}. Lower optim.lr or objective.reward_weight and run the command again: it "
                "resumes from the last checkpoint."
            )
        self._between_steps = False
        if finite:
            self.optimiser.step()
            self._update_average()
        self.skipped += not finite
        self.optimiser.zero_grad()
        return metrics | {"skipped": not finite, "skipped_in_all": self.skipped}

    @torch.no_grad()
    def _update_average(self) -> None:
        """Moves the exponential average of the weights, faster in the first steps."""
        decay = min(self.config.optim.ema_decay, (self.step + 1) / (self.step + 10))
        for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(value, 1.0 - decay)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        full = next(self.base.backbone.parameters()).dtype == torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.optim.bf16 and full)

    def _speed(self, seconds: float) -> Metrics:
        passes, processes = step_passes(self.config), self.accelerator.num_processes
        images = passes.reward_batch * passes.updates + passes.preference_batch
        metrics: Metrics = {"images_per_second": images * processes / seconds}
        if self.device.type == "cuda":
            metrics["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        return metrics

    # --------------------------------------------------------------------------------------------- whole run

    def fit(self, on_step: Callable[[Metrics], None] | None = None) -> None:
        """Trains to the last step; on an exception it saves a checkpoint and raises the exception again.

        Raises:
            Stopped: SIGTERM or Ctrl-C came.
            KeyboardInterrupt: Ctrl-C came twice.
            HyperAlignError: the gradients stay infinite, the disk is full, or another process failed.
        """
        time_left, stop = TimeLeft(self.config.optim.steps), StopRequest()
        try:
            with stop.listening():
                self._validate_base(stop)
                while self._unlogged or self.step < self.config.optim.steps:
                    if not self._unlogged:
                        self._unlogged = self._train_step()
                        self._unlogged["seconds_left"] = time_left.after(self.step)
                        self._between_steps = True
                    if self._is_validated() or self.step % self.config.run.checkpoint_every == 0:
                        self._save_checkpoint()
                    if self._is_validated():
                        self._stop_if(stop.received)
                        with stop.immediate():
                            metrics = self._validate(self.averaged(), self.step)
                        self._unlogged |= self._kept(metrics)
                    self._report(on_step)
                    self._stop_if(stop.received)
        finally:
            if self._between_steps:
                self._save_checkpoint()
        self.export()
        self.accelerator.end_training()

    def _stop_if(self, requested: bool) -> None:
        """Raises Stopped if any process received a request to stop."""
        if any_process(requested, self.accelerator):
            raise Stopped

    def _report(self, on_step: Callable[[Metrics], None] | None) -> None:
        metrics = self._unlogged
        if self.accelerator.is_main_process:
            self._log.append(metrics)
        self._unlogged = {}
        if self.accelerator.is_main_process and on_step is not None:
            on_step(metrics)
        self.accelerator.log(flat(metrics), step=metrics["step"])

    def _is_validated(self) -> bool:
        every = self.config.validation.every
        return bool(every) and (self.step % every == 0 or self.step == self.config.optim.steps)

    def _validate_base(self, stop: StopRequest) -> None:
        """Validates the base model before the first step; a run that goes on has its figures already."""
        if self.results.baseline or not self.config.validation.every or self.step >= self.config.optim.steps:
            return
        self._stop_if(stop.received)
        with stop.immediate():
            metrics = self._validate(None, 0)
        self.results.baseline = {"step": self.step, "metrics": metrics}

    def _validate(self, hyperalign: HyperAlign | None, step: int) -> Metrics:
        grid = self.config.run.out / "grids" / f"{step:05d}.png"
        with attention_kernels(self.config.run.attention_kernels, self.device):
            return self.inputs.validate(hyperalign, grid, step == self.config.optim.steps)

    def _kept(self, metrics: Metrics) -> Metrics:
        """Writes the weights that were validated; returns what the log says about them."""
        if not self.accelerator.is_main_process:
            return {"validation": metrics}
        return self.results.keep(self.average, self.step, metrics)

    def _save_checkpoint(self) -> None:
        """Saves the whole state of the run; it is the same in every process, so the main one writes it."""
        if not self.accelerator.is_main_process:
            return
        state: Checkpoint = {
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "images_seen": self.images_seen,
            "skipped": self.skipped,
            "unlogged": self._unlogged,
            "key_times": list(self.schedule.key_times),
            "processes": self.accelerator.num_processes,
            "identity": self._identity,
            "header": header_text(self.results.header(self.step)),
            **self.results.state(),
        }
        self._checkpoints.save(state, self.step)

    def _resume(self, saved: Checkpoint) -> None:
        self.network.load_state_dict(saved["network"])
        self.average.load_state_dict(saved["average"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.step, self.images_seen = int(saved["step"]), int(saved["images_seen"])
        self.skipped = int(saved["skipped"])
        self.results.restore(saved)
        self._unlogged = saved.get("unlogged", {})

    # --------------------------------------------------------------------------------------------- the result

    @property
    def path(self) -> Path:
        """The file of the finished hypernetwork."""
        return self.results.path

    def averaged(self) -> HyperAlign:
        """Returns the averaged hypernetwork: what is validated and exported."""
        return HyperAlign(self.average, self.hyperalign.header)

    def export(self) -> Path:
        """Writes the averaged hypernetwork, with its provenance in the header, and its model card."""
        if self.accelerator.is_main_process:
            self.results.finish(self.average, self.step)
        return self.path
