"""What a training method works with in one step of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.schedule import Schedule
from train.config import ObjectiveConfig, TrainConfig
from train.inputs import RunInputs
from train.methods.pairs import Pairs
from train.models.base import Base
from train.objective import NoisedImages
from train.processes import gradient_of
from train.randomness import StepRandomness, normal, sample_u
from train.transfer import to_device

StepMetrics = dict[str, Tensor]
"""Scalars on the device: nothing waits for it until the step ends."""


@dataclass(slots=True)
class Step:
    """One step: the run's parts, the step's random numbers, and what of the data it has read."""

    config: TrainConfig
    inputs: RunInputs
    adapter: Adapter
    schedule: Schedule
    accelerator: Accelerator
    number: int
    images_seen: int
    """Preference images that all processes read before this step."""
    micro_batch: int
    """Images in one backward pass; 0 is all."""
    images_read: int = 0
    """Preference images that all processes have read in this step."""

    @property
    def objective(self) -> ObjectiveConfig:
        """The objective's settings."""
        return self.config.objective

    @property
    def base(self) -> Base:
        """The base model."""
        return self.inputs.base

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.accelerator.device

    @property
    def randomness(self) -> StepRandomness:
        """The step's random numbers."""
        processes = self.accelerator.num_processes
        return StepRandomness(self.config.run.seed, self.number, self.accelerator.process_index, processes)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Runs frozen models in bfloat16 if the recipe says so and their weights are in float32."""
        full = next(self.base.backbone.parameters()).dtype == torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.optim.bf16 and full)

    def micro_batches(self, count: int) -> Iterator[tuple[slice, float]]:
        """Yields the slices of backward passes with their shares of the batch."""
        size = self.micro_batch or count
        for first in range(0, count, size):
            last = min(first + size, count)
            yield slice(first, last), (last - first) / count

    def backward(self, loss: Tensor) -> None:
        """Adds a loss's gradient to that of the network."""
        self.accelerator.backward(loss)

    def gradient(self) -> Tensor:
        """Returns this process's gradient so far as one vector."""
        return gradient_of(self.adapter.network.parameters())

    def prompts_and_noise(self, prompts: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
        """Returns this process's prompts for rollouts, and the noise they begin with."""
        whole, own = prompts * self.accelerator.num_processes, self.randomness.part(prompts)
        return self.inputs.prompts.sample(whole, rng)[own], self.normal(prompts, rng)

    def normal(self, count: int, rng: np.random.Generator) -> Tensor:
        """Returns this process's noise (count, C, H, W)."""
        whole, own = count * self.accelerator.num_processes, self.randomness.part(count)
        return to_device(normal((whole, *self.base.latent_shape), rng)[own], self.device)

    @property
    def state(self) -> Literal["rollout", "noised"]:
        """Where this step's rewarded states come from."""
        state = self.objective.state
        return ("rollout", "noised")[self.number % 2] if state == "mixed" else state

    @property
    def caption_dropout(self) -> float:
        """Share of captions that are left empty: only CFG samples with the empty prompt."""
        return self.objective.caption_dropout if self.base.cfg else 0.0

    def chances(self, count: int, rng: np.random.Generator) -> Tensor:
        """Returns this process's numbers in [0, 1), (count,)."""
        whole, own = count * self.accelerator.num_processes, self.randomness.part(count)
        return torch.from_numpy(rng.random((whole,))[own]).to(self.device)

    def preference_images(
        self, count: int, bounds: tuple[float, float], purpose: int, dropout: float = 0.0
    ) -> NoisedImages:
        """Returns this process's preference images; a share `dropout` of the captions is empty.

        Raises HyperAlignError where the run has none.
        """
        if self.inputs.preference is None:
            raise HyperAlignError("The run needs preference images; set data.preference.")
        rng, own, position, whole = self._reading(count, purpose)
        x0, captions = self.inputs.preference.batch(position, whole, rng, own)
        return self._noised(x0, captions, bounds, rng, dropout)

    def pairs(self, count: int, bounds: tuple[float, float], purpose: int, dropout: float = 0.0) -> Pairs:
        """Returns this process's pairs; a share `dropout` of the captions is empty.

        Raises HyperAlignError where the run has none.
        """
        if self.inputs.pairs is None:
            raise HyperAlignError("The run needs pairs of images; set data.preference.")
        rng, own, position, whole = self._reading(count, purpose)
        x0, rejected, captions = self.inputs.pairs.pairs(position, whole, rng, own)
        preferred = self._noised(x0, captions, bounds, rng, dropout)
        return Pairs(preferred, to_device(rejected, self.device))

    def _reading(self, count: int, purpose: int) -> tuple[np.random.Generator, slice, int, int]:
        randomness, whole = self.randomness, count * self.accelerator.num_processes
        position = self.images_seen + self.images_read
        self.images_read += whole
        return randomness.generator(purpose), randomness.part(count), position, whole

    def _noised(
        self,
        x0: Tensor,
        captions: list[str],
        bounds: tuple[float, float],
        rng: np.random.Generator,
        dropout: float,
    ) -> NoisedImages:
        """Returns this process's images with noise and timesteps that are decided for all processes."""
        count = len(x0)
        whole, own = count * self.accelerator.num_processes, self.randomness.part(count)
        chances = rng.random((whole,))[own] if dropout else np.ones(count)
        u_B = sample_u(whole, bounds, self.objective.timestep_sampling, rng)[own]
        shape = (whole, *x0.shape[1:])  # of the bucket
        eps = to_device(normal(shape, rng)[own], self.device)
        again = self.schedule.variant != "S"
        eps_gen = to_device(normal(shape, rng)[own], self.device) if again else eps
        t_B = self.base.noise_schedule.at_position(u_B)
        kept = ["" if chance < dropout else text for text, chance in zip(captions, chances, strict=True)]
        return NoisedImages(to_device(x0, self.device), eps, eps_gen, t_B, kept)


Method = Callable[[Step], Iterator[StepMetrics]]
"""A training method: adds up the gradient of an update and yields its metrics, once a step or several times.

The network is updated, and its gradient cleared, before the method goes on.
"""
