"""Measures the statistics by which a hypernetwork standardises what it perceives of a sampling base model.

Features, text and decoded tokens are nearly the same for every prompt and time; what differs would drown.
Standardised at the start of a run, they begin with equal variance in every channel, as activation
normalisation is initialised by data (Kingma and Dhariwal 2018, section 3.1). The statistics are fixed then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from hyperalign.hosts.diffusers.adapter import Adapter, Call
from hyperalign.hypernetwork import HyperNetwork
from hyperalign.perception import Perceived, Statistics, pool_features
from hyperalign.schedule import Schedule
from train.config import TrainConfig
from train.inputs import SamplingInputs
from train.models.base import cfg_conditions, take
from train.randomness import StepRandomness, normal
from train.relative_distance import measuring_batch
from train.rollout import rollout

logger = logging.getLogger("hyperalign.train")
STEPS = 8
"""Of a rollout, or as many as in training if these are fewer."""
SEED = 6
LEAST_DEVIATION = 0.01
"""Of the root mean square over the channels: one that hardly ever differs is not blown up."""

Watch = Callable[[], Iterable[Perceived]]
"""Yields what is perceived along the rollouts, the same at each call."""


class Moments:
    """Mean and deviation over rows, added up on the CPU in float64, which not every device has."""

    def __init__(self) -> None:
        self._count = 0
        self._shift = self._sum = self._squares = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Adds values (N, ...)."""
        values = rows.detach().to("cpu", torch.float64)
        if not self._count:  # sums of squares lose what is far smaller than the mean
            self._shift = values.mean(dim=0)
        moved = values - self._shift
        self._count += len(values)
        self._sum = self._sum + moved.sum(dim=0)
        self._squares = self._squares + moved.square().sum(dim=0)

    def write(self, statistics: Statistics) -> None:
        """Sets the statistics in place."""
        mean = self._sum / self._count
        deviation = (self._squares / self._count - mean.square()).clamp(min=0.0).sqrt()
        least = LEAST_DEVIATION * deviation.square().mean().sqrt()
        statistics.mean.copy_(mean + self._shift)
        statistics.deviation.copy_(torch.where(least > 0, deviation.clamp(min=float(least)), 1.0))


@torch.no_grad()
def measure_statistics(
    inputs: SamplingInputs, adapter: Adapter, config: TrainConfig, accelerator: Accelerator
) -> None:
    """Sets the statistics of a new hypernetwork that perceives.

    All processes measure, as a backbone that is sharded over them needs, and take what the main one found.

    Args:
        inputs: the base model and the prompts to measure on.
        adapter: of the base model and the new hypernetwork.
        config: the recipe.
        accelerator: the processes of the run.
    """
    network = adapter.network
    if network.is_static:
        return
    calls = list(base_calls(inputs, config))
    standardise(network, lambda: (adapter.perceive(call) for call in calls))
    for buffer in network.buffers():
        buffer.copy_(broadcast(buffer))
    logger.info("measured the statistics of what the hypernetwork perceives: %d calls", len(calls))


def standardise(network: HyperNetwork, watch: Watch) -> None:
    """Sets the statistics in place: of features and text first, then of the tokens decoded from them."""
    perception = network.perception
    levels = cast("list[Statistics]", [*perception.feature_statistics])
    statistics = [*levels, perception.text_statistics]
    moments = [Moments() for _ in statistics]
    for perceived in watch():
        for level, feature in zip(moments, pool_features(perceived.features), strict=False):
            level.add(feature.transpose(0, 1).flatten(1).T)
        moments[-1].add(perceived.prompt_BC)
    for found, measured in zip(statistics, moments, strict=True):
        measured.write(found)
    tokens = Moments()
    for perceived in watch():
        tokens.add(network.tokens(perceived))
    tokens.write(network.token_statistics)


def base_calls(inputs: SamplingInputs, config: TrainConfig) -> Iterator[Call]:
    """Yields the calls at the states of the base model's rollouts: two in three with a prompt.

    The others have the empty prompt, with which guidance samples too.
    """
    o, count = config.objective, config.model.statistics_prompts
    base, rng = inputs.base, StepRandomness(SEED, 0).generator(1)
    prompts = inputs.prompts.sample(count, rng)
    noise = normal((count, *base.latent_shape), rng).to(base.device)
    batch = measuring_batch(o.images_at_once)
    for first in range(0, count, batch):
        chunk = prompts[first : first + batch]
        cond, uncond = cfg_conditions(base, inputs.encoder, chunk, o.guidance_scale)
        trajectory = rollout(
            base, None, Schedule("I"), cond, uncond, noise[first : first + batch],
            steps=min(STEPS, o.rollout_steps), guidance_scale=o.guidance_scale,
        )  # fmt: skip
        every_second = slice(first % 2, None, 2)  # of all prompts, whatever the batch
        for x, t in zip(trajectory.states, trajectory.timesteps, strict=True):
            yield base.call(x, torch.full((len(x),), t, device=x.device), cond)
            x_half = x[every_second]
            if uncond is not None and len(x_half):
                t_half = torch.full((len(x_half),), t, device=x.device)
                yield base.call(x_half, t_half, take(uncond, every_second))
