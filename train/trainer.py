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

import numpy as np
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
from train.models.base import cfg_conditions, with_guidance
from train.models.fsdp import uses_fsdp
from train.models.kernels import attention_kernels
from train.objective import States, noised_states, preference_loss, reward_loss, rollout_states
from train.processes import any_process, average_gradients, gradient_of, mean_metrics
from train.randomness import StepRandomness, normal, sample_u
from train.relative_distance import weight_schedule
from train.results import Results
from train.rollout import rollout
from train.start import begin_from, new_hyperalign
from train.statistics import measure_statistics
from train.stopping import Stopped, StopRequest
from train.transfer import to_device

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
        with attention_kernels(self.config.run.attention_kernels, self.device):
            before: Metrics = {"step": self.step} | self.results.baseline_of(self.step)
            metrics = before | self._apply_gradient(self._passes())
        seconds = time.monotonic() - started
        return metrics | {"seconds": seconds} | self._speed(seconds)

    def _gradients(self) -> dict[str, Tensor]:
        """Adds up the gradient of L = w_R L_R + w_G L_G (Eq 10), one loss after the other.

        The metrics stay on the device, whose work nothing waits for until the step ends.
        """
        metrics: dict[str, Tensor] = {}
        if self.config.objective.reward_weight:
            metrics |= self._reward_pass()
        if self.config.objective.preference_weight:
            metrics |= self._preference_pass()
        return metrics

    def _passes(self) -> dict[str, Tensor]:
        """Returns the metrics of `_gradients`, averaged over the processes.

        A process that fails reports it at the next exchange, so that the others do not wait for it. With a
        sharded backbone the processes exchange in each pass, and the launcher ends them.
        """
        self._images_read = 0
        self.optimiser.zero_grad()
        metrics: dict[str, Tensor] = {}
        failure: Exception | None = None
        try:
            metrics = self._gradients()
        except Exception as error:
            if uses_fsdp(self.accelerator):
                raise
            failure = error
        if not any_process(failure is not None, self.accelerator):
            own = {"grad_norm_reward", "grad_norm_preference"}
            shared = {name: value for name, value in metrics.items() if name not in own}
            return metrics | mean_metrics(shared, self.accelerator)
        out_of_memory = failure is None or isinstance(failure, torch.cuda.OutOfMemoryError)
        if not any_process(not out_of_memory, self.accelerator) and self._halve_micro_batch():
            failure = None  # its traceback holds on to activations
            return self._passes()
        raise failure or HyperAlignError(
            f"Another process failed in step {self.step} and reports the reason. Run the same command again "
            "to resume."
        )

    def _halve_micro_batch(self) -> bool:
        """Halves the backward passes, once in a run, and says so; returns whether it could."""
        o = self.config.objective
        largest = o.largest_batch
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

    def _reward_pass(self) -> dict[str, Tensor]:
        """L_R through one step from states of a rollout, of noised images, or of both in turn (Eq 8)."""
        o = self.config.objective
        kind = o.state if o.state != "mixed" else ("rollout", "noised")[self.step % 2]
        states = self._rollout_states() if kind == "rollout" else self._noised_states()
        losses, scores = list[Tensor](), dict[str, list[Tensor]]()
        for part, share in self._micro_batches(len(states)):
            with self._autocast():
                loss, found = reward_loss(
                    self.adapter, self.base, self.inputs.rewards, states[part],
                    guidance_scale=o.guidance_scale, cap=o.reward_cap, conditional_only=o.conditional_only,
                    weighting=o.reward_weighting,
                )  # fmt: skip
            self.accelerator.backward(o.reward_weight * share * loss)
            losses.append(share * loss.detach())
            for name, score_B in found.items():
                scores.setdefault(name, []).append(score_B)
        metrics = {name: torch.cat(parts) for name, parts in scores.items()}
        return {
            "reward_loss": torch.stack(losses).sum(),
            **{name: score_B.nanmean() for name, score_B in metrics.items()},
            "not_finite": metrics["reward"].isnan().float().mean(),
            "grad_norm_reward": gradient_of(self.network.parameters()).norm(),
        }

    def _rollout_states(self) -> States:
        """Samples prompts with the current hypernetwork; returns the states before some of the steps."""
        o, randomness = self.config.objective, self._randomness()
        rng = randomness.generator(1)
        whole, own = o.prompt_batch * self.accelerator.num_processes, randomness.part(o.prompt_batch)
        prompts = self.inputs.prompts.sample(whole, rng)[own]
        noise = to_device(normal((whole, *self.base.latent_shape), rng)[own], self.device)
        choices = np.arange(o.skip_first, o.rollout_steps)
        picks = sorted(rng.choice(choices, o.timesteps, replace=False).tolist())
        cond, uncond = cfg_conditions(self.base, self.inputs.encoder, prompts, o.guidance_scale)
        with self._autocast():
            trajectory = rollout(
                self.base, self.adapter, self.schedule, cond, uncond, noise,
                steps=o.rollout_steps, guidance_scale=o.guidance_scale, until=max(picks),
            )  # fmt: skip
        return rollout_states(trajectory, picks, cond, uncond, prompts)

    def _noised_states(self) -> States:
        """Returns noised preference images."""
        o = self.config.objective
        x0, eps, eps_gen, t_B, captions = self._preference_images(
            o.prompt_batch * o.timesteps, o.reward_range, purpose=3
        )
        cond, uncond = cfg_conditions(self.base, self.inputs.encoder, captions, o.guidance_scale)
        return noised_states(self.base, self.schedule, x0, eps, eps_gen, t_B, cond, uncond, captions)

    def _preference_pass(self) -> dict[str, Tensor]:
        """L_G on noised preference images (Eq 9)."""
        o = self.config.objective
        # Only CFG samples with the empty prompt.
        dropout = o.caption_dropout if self.base.cfg else 0.0
        x0, eps, eps_gen, t_B, captions = self._preference_images(
            o.preference_batch, o.preference_range, purpose=2, dropout=dropout
        )
        cond = with_guidance(self.base, self.inputs.encoder.conditions(captions), o.preference_guidance)
        states = noised_states(self.base, self.schedule, x0, eps, eps_gen, t_B, cond, None, captions)
        losses, before = list[Tensor](), gradient_of(self.network.parameters())
        for part, share in self._micro_batches(len(states)):
            with self._autocast():
                loss = preference_loss(
                    self.adapter, self.base, x0[part], eps[part], states[part], o.snr_gamma
                )
            self.accelerator.backward(o.preference_weight * share * loss)
            losses.append(share * loss.detach())
        added = gradient_of(self.network.parameters()) - before
        return {"preference_loss": torch.stack(losses).sum(), "grad_norm_preference": added.norm()}

    def _preference_images(
        self, count: int, bounds: tuple[float, float], purpose: int, dropout: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
        """Returns latents, noise, other noise, timesteps and captions of this process's preference images.

        The timesteps are on the CPU, where P and I look up when their weights are generated.
        """
        if self.inputs.preference is None:
            raise HyperAlignError("The run needs preference images; set data.preference.")
        randomness, whole = self._randomness(), count * self.accelerator.num_processes
        rng, own = randomness.generator(purpose), randomness.part(count)
        position = self.images_seen + self._images_read
        x0, captions = self.inputs.preference.batch(position, whole, rng, own)
        self._images_read += whole
        chances = rng.random((whole,))[own] if dropout else np.ones(count)
        u_B = sample_u(whole, bounds, self.config.objective.timestep_sampling, rng)[own]
        shape = (whole, *x0.shape[1:])  # of the bucket
        eps = to_device(normal(shape, rng)[own], self.device)
        again = self.schedule.variant != "S"
        eps_gen = to_device(normal(shape, rng)[own], self.device) if again else eps
        t_B = self.base.noise_schedule.at_position(u_B)
        kept = ["" if chance < dropout else text for text, chance in zip(captions, chances, strict=True)]
        return to_device(x0, self.device), eps, eps_gen, t_B, kept

    def _apply_gradient(self, measured: dict[str, Tensor]) -> Metrics:
        """Ends the step, with an update if the gradient is finite; returns its metrics as numbers.

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
        self.images_seen += self._images_read
        self.step += 1
        self.optimiser.zero_grad()
        return metrics | {"skipped": not finite, "skipped_in_all": self.skipped}

    @torch.no_grad()
    def _update_average(self) -> None:
        """Moves the exponential average of the weights, faster in the first steps."""
        decay = min(self.config.optim.ema_decay, (self.step + 1) / (self.step + 10))
        for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(value, 1.0 - decay)

    def _micro_batches(self, count: int) -> Iterator[tuple[slice, float]]:
        """Yields the slices of backward passes with their shares of the batch."""
        size = self._micro_batch or count
        for first in range(0, count, size):
            last = min(first + size, count)
            yield slice(first, last), (last - first) / count

    def _randomness(self) -> StepRandomness:
        processes = self.accelerator.num_processes
        return StepRandomness(self.config.run.seed, self.step, self.accelerator.process_index, processes)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        full = next(self.base.backbone.parameters()).dtype == torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.optim.bf16 and full)

    def _speed(self, seconds: float) -> Metrics:
        o, processes = self.config.objective, self.accelerator.num_processes
        images = o.rewarded_images + o.preferred_images
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
