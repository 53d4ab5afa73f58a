"""DanceGRPO (Xue et al. 2025, arXiv 2505.07818): all steps are stochastic, a share of them is trained.

Diffusion takes DDIM's steps with noise eta, a flow those of its SDE with constant eta (eq 7). All samples of
a group begin with one noise, and the last step, which ends at x0-hat, is not trained.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from train.methods.grpo import group_rollout, group_updates
from train.methods.step import Step, StepMetrics
from train.models.fsdp import uses_fsdp
from train.transitions import stochastic


def dance_grpo(step: Step) -> Iterator[StepMetrics]:
    """Adds the gradients of the group's updates."""
    steps = step.objective.rollout_steps - 1
    found = group_rollout(step, [stochastic(step.base.noise_schedule, step.config.grpo.eta)] * steps)
    rng = step.randomness.generator(9)
    # Processes that share a sharded model wait for each other in every pass, and take as many.
    first = 0 if uses_fsdp(step.accelerator) else step.randomness.part(len(found.prompts)).start
    chosen = [_trained(steps, step.config.grpo.trained_share, rng) for _ in range(_all_samples(step))]
    yield from group_updates(step, found, lambda sample: chosen[first + sample])


def _all_samples(step: Step) -> int:
    config = step.config.grpo
    return step.objective.prompt_batch * config.group * step.accelerator.num_processes


def _trained(steps: int, share: float, rng: np.random.Generator) -> list[int]:
    """Returns which of the steps a sample trains."""
    return sorted(rng.permutation(steps)[: max(1, int(steps * share))].tolist())
