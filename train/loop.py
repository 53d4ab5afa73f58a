"""The training loop: rollout, two backward passes, one averaged step; resumable at any point."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hyperalign import checkpoint
from hyperalign.checkpoint import Header, HyperAlign
from hyperalign.errors import HyperAlignError
from hyperalign.families.unet import LAST_TIMESTEP
from hyperalign.hosts.diffusers import Adapter, spec_of
from hyperalign.hosts.diffusers_tiny import TinyBase, load_tiny
from hyperalign.hypernetwork import HyperNetwork
from hyperalign.schedule import Schedule
from hyperalign.tiny.judges import load_reward
from hyperalign.tiny.text_encoder import tokenize_batch
from train.attention import use_float32_attention
from train.config import TrainConfig, as_table
from train.data import preferred_pictures, training_prompts
from train.key_times import base_key_times
from train.objective import preference_loss, reward_loss
from train.rollout import Trajectory, rollout

logger = logging.getLogger("hyperalign.train")

Row = dict[str, Any]


def new_hyperalign(config: TrainConfig, base: TinyBase, schedule: Schedule) -> HyperAlign:
    """Returns an untrained hypernetwork for the base; it changes nothing yet."""
    spec = spec_of(base.unet)
    targets = spec.targets(config.model.mode)
    network = HyperNetwork(config.network, targets, spec.feature_channels)
    header = Header(
        base=spec.fingerprint(),
        mode=config.model.mode,
        feature_channels=spec.feature_channels,
        targets=targets,
        network=config.network,
        schedule=schedule,
    )
    return HyperAlign(network, header)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    optim = config.optim
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.lr * 0.5 * (1.0 + float(np.cos(np.pi * progress)))


class Trainer:
    """One training run in one folder.

    Everything random in a step is drawn from (seed, step, process), so a resumed run continues the
    exact loss curve.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator | None = None) -> None:
        """Loads the base, the reward and the preferred pictures. Raises HyperAlignError."""
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.config = config
        self.accelerator = accelerator or Accelerator()
        self.device = self.accelerator.device
        self.base = load_tiny(self.device)
        if config.optim.bf16 and self.device.type == "cpu":
            use_float32_attention(self.base.unet)
        torch.manual_seed(config.run.seed)
        self.schedule = self._schedule()
        self.hyperalign = new_hyperalign(config, self.base, self.schedule)
        self.network = self.hyperalign.network.to(self.device)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.adapter = Adapter(self.base.unet, self.hyperalign)
        self.reward = load_reward().eval().requires_grad_(False).to(self.device)
        with self.accelerator.main_process_first():
            self.preferred = preferred_pictures(self.base, config.data)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), config.optim.lr, (0.9, 0.99), weight_decay=config.optim.weight_decay
        )
        self.step = 0
        config.run.out.mkdir(parents=True, exist_ok=True)
        self._resume()

    @property
    def path(self) -> Path:
        """Where the finished hypernetwork goes."""
        return self.config.run.out / "hypernetwork.safetensors"

    def averaged(self) -> HyperAlign:
        """Returns the averaged hypernetwork: what is evaluated and saved."""
        return HyperAlign(self.average, self.hyperalign.header)

    def fit(self, on_step: Callable[[Row], None] | None = None) -> None:
        """Trains to the last step; on interruption the state is saved and the exception goes on."""
        try:
            while self.step < self.config.optim.steps:
                row = self._train_step()
                self.step += 1
                if self.accelerator.is_main_process:
                    self._log(row | self._evaluate())
                    if on_step is not None:
                        on_step(row)
                if self.step % self.config.run.save_every == 0:
                    self._save_state()
        finally:
            self._save_state()
        self.export()

    def export(self) -> Path:
        """Writes the averaged hypernetwork with a header that says how it was made."""
        training = {
            "steps": self.step,
            "reward": "tiny preference reward (hyperalign/tiny/weights/reward.safetensors)",
            "preference_data": "EmojiScenes, right captions, Fluent style (Fluent Emoji, MIT)",
            "recipe": as_table(self.config) | {"run": {"seed": self.config.run.seed}, "data": {
                "scenes": self.config.data.scenes, "seed": self.config.data.seed}},
        }  # fmt: skip
        header = dataclasses.replace(self.hyperalign.header, training=training)
        if self.accelerator.is_main_process:
            checkpoint.save(self.path, self.average, header)
        return self.path

    def _schedule(self) -> Schedule:
        model = self.config.model
        if model.variant != "P" or model.key_times:
            return self.config.schedule()
        times = base_key_times(self.base, count=model.key_count, guidance=self.config.objective.guidance)
        logger.info("key times found on the base model: %s", ", ".join(f"{t:.3f}" for t in times))
        return Schedule("P", times)

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng(
            (self.config.run.seed, self.step, self.accelerator.process_index, *purpose)
        )

    def _noise(self, rows: int, rng: np.random.Generator) -> Tensor:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return torch.randn(rows, *self.preferred.latents.shape[1:], generator=generator).to(self.device)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.optim.bf16)

    def _train_step(self) -> Row:
        started = time.monotonic()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        row: Row = {"step": self.step}
        if self.config.objective.reward_weight:
            row |= self._reward_pass()
        if self.config.objective.preference_weight:
            row |= self._preference_pass()
        norm = self._synchronised_gradient_norm()
        if bool(torch.isfinite(norm)):
            self.optimiser.step()
            self._update_average()
        self.optimiser.zero_grad()
        seconds = time.monotonic() - started
        return row | {"grad_norm": float(norm), "skipped": not bool(torch.isfinite(norm)), "seconds": seconds}

    def _reward_pass(self) -> Row:
        """Rollout without gradient, then L_R through one step of it (Eq 8)."""
        o, rng = self.config.objective, self._generator(1)
        tokens = tokenize_batch(training_prompts(o.prompts, int(rng.integers(2**31)))).to(self.device)
        noise = self._noise(o.prompts, rng)
        picks = sorted(
            rng.choice(np.arange(o.skip_first, o.rollout_steps), o.timesteps, replace=False).tolist()
        )
        context = self._context(tokens)
        with self._autocast():
            trajectory = self._rollout(context, noise)
            loss, score = reward_loss(
                self.adapter, self.base.decode, self.reward, trajectory, context, tokens, picks,
                guidance=o.guidance, cap=o.reward_cap,
            )  # fmt: skip
        self.accelerator.backward(o.reward_weight * loss)
        return {"reward_loss": loss.item(), "reward": score.item(), "grad_norm_reward": self._gradient_norm()}

    def _context(self, tokens_BL: Tensor) -> Tensor:
        empty = tokenize_batch([""]).to(self.device).expand(len(tokens_BL), -1)
        with torch.no_grad():
            return self.base.text_encoder(torch.cat([tokens_BL, empty]))

    def _rollout(self, context_2BLC: Tensor, noise: Tensor) -> Trajectory:
        o = self.config.objective
        return rollout(
            self.base.unet, self.adapter, self.schedule, context_2BLC, noise,
            steps=o.rollout_steps, guidance=o.guidance,
        )  # fmt: skip

    def _preference_pass(self) -> Row:
        """L_G on noised preferred pictures (Eq 9)."""
        o, rng = self.config.objective, self._generator(2)
        rows = torch.from_numpy(rng.integers(len(self.preferred.latents), size=o.preferred))
        x0 = self.preferred.latents[rows].to(self.device)
        tokens = self.preferred.tokens[rows].clone()
        tokens[torch.from_numpy(rng.random(o.preferred) < o.drop_caption)] = tokenize_batch([""])[0]
        low, high = (round(u * LAST_TIMESTEP) for u in o.preferred_range)
        t_B = torch.from_numpy(rng.integers(low, high + 1, size=o.preferred)).to(self.device)
        with torch.no_grad():
            context = self.base.text_encoder(tokens.to(self.device))
        with self._autocast():
            loss = preference_loss(
                self.adapter, self.schedule, x0, self._noise(o.preferred, rng), t_B, context, o.snr_cap
            )
        self.accelerator.backward(o.preference_weight * loss)
        return {"preference_loss": loss.item()}

    def _gradient_norm(self) -> float:
        grads = [p.grad for p in self.network.parameters() if p.grad is not None]
        return float(torch.stack([g.norm() for g in grads]).norm()) if grads else 0.0

    def _synchronised_gradient_norm(self) -> Tensor:
        """Averages gradients over processes in one flat reduction, clips, returns the norm.

        The two losses are two backward passes; a DistributedDataParallel wrapper would reduce in
        each of them and trip over parameters that one pass does not use.
        """
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            grads = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            reduced = self.accelerator.reduce(flat, reduction="mean")
            if not isinstance(reduced, Tensor):
                raise HyperAlignError(
                    f"Accelerate returned a {type(reduced).__name__} for a reduced gradient."
                )
            for grad, mean in zip(grads, reduced.split([g.numel() for g in grads]), strict=True):
                grad.copy_(mean.view_as(grad))
        return nn.utils.clip_grad_norm_(parameters, self.config.optim.clip)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.optim.ema, (self.step + 1) / (self.step + 10))
        for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(value, 1.0 - decay)

    def _evaluate(self) -> Row:
        every = self.config.eval.every
        if not every or (self.step % every and self.step != self.config.optim.steps):
            return {}
        from train.evaluate import figures, sample_all
        from train.grids import save_grid

        samples = sample_all(
            self.base, self.averaged(), self.config.eval.prompts, seeds=(0,), steps=self.config.eval.steps,
            guidance=self.config.objective.guidance, bf16=self.config.optim.bf16,
        )  # fmt: skip
        save_grid(samples, self.config.run.out / "grids" / f"{self.step:05d}.png")
        return {"heldout": figures(samples)}

    def _log(self, row: Row) -> None:
        with (self.config.run.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(_rounded(row)) + "\n")

    @property
    def _state_path(self) -> Path:
        return self.config.run.out / "state.pt"

    def _save_state(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "recipe": json.dumps(_identity(self.config)),
        }
        partial = self._state_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._state_path)

    def _resume(self) -> None:
        log = self.config.run.out / "log.jsonl"
        if not self._state_path.exists():
            log.unlink(missing_ok=True)
            return
        state = torch.load(self._state_path, map_location=self.device, weights_only=True)
        if json.loads(state["recipe"]) != json.loads(json.dumps(_identity(self.config))):
            raise HyperAlignError(
                f"{self.config.run.out} holds a run of another recipe. Choose another --run.out, "
                "delete the folder, or use the recipe it was started with."
            )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = int(state["step"])
        if log.exists() and self.accelerator.is_main_process:
            rows = log.read_text(encoding="utf-8").splitlines()
            kept = [row for row in rows if json.loads(row)["step"] < self.step]
            log.write_text("".join(row + "\n" for row in kept), encoding="utf-8")


def _identity(config: TrainConfig) -> Row:
    """What decides a run's numbers, and so whether a state may be continued."""
    table = as_table(config)
    return {key: table[key] for key in ("model", "network", "objective", "optim")} | {
        "data": [config.data.scenes, config.data.seed],
        "seed": config.run.seed,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}  # pyright: ignore
    return round(value, 6) if isinstance(value, float) else value
