"""MixGRPO (Li et al. 2025, arXiv 2507.21802): a window of stochastic, trained steps among deterministic ones.

The window begins at the noisiest steps and moves towards the image; behind the last step it begins again.
Inside it a flow takes the steps of its SDE with g = eta sqrt(u / (1 - u)) (Flow-GRPO), diffusion DDIM's with
noise eta.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from train.methods.grpo import group_rollout, group_updates
from train.methods.settings import GrpoConfig
from train.methods.step import Step, StepMetrics
from train.noise import FlowSchedule
from train.transitions import Transition, ddim, flow_sde


def mix_grpo(step: Step) -> Iterator[StepMetrics]:
    """Adds the gradients of the group's updates, which train the window's steps."""
    steps = step.objective.rollout_steps - 1
    inside = window(step.config.grpo, steps, step.number)
    transitions = [_stochastic(step) if index in inside else ddim(0.0) for index in range(steps)]
    yield from group_updates(step, group_rollout(step, transitions), lambda _: inside)


def window(config: GrpoConfig, steps: int, number: int) -> range:
    """Returns the window of a training step; it always has its whole width."""
    width = min(config.window, steps)
    moved = number // config.window_interval * config.window_stride
    start = moved % (steps - width + 1)
    return range(start, start + width)


def _stochastic(step: Step) -> Transition:
    eta = step.config.grpo.eta
    if isinstance(step.base.noise_schedule, FlowSchedule):
        return flow_sde(lambda u, u_next: eta * math.sqrt(u / (1.0 - (u if u < 1.0 else u_next))))
    return ddim(eta)
