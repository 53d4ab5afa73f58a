"""Group-relative policy optimisation: what DanceGRPO and MixGRPO share (Flow-GRPO, arXiv 2505.05470, eq 5).

Several samples of a prompt are drawn with noise in their steps. A sample's advantage A is its reward,
standardised within its group. Each trained step has a ratio of densities of the sampled x_s, now and in the
rollout: r = exp(log p(x_s | x_t) - log p_rollout(x_s | x_t)). The loss is the mean of
max(-A r, -A clip(r, 1 - c, 1 + c)). Log-densities are means over dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.methods.step import Step, StepMetrics
from train.models.base import Conditions, cfg_conditions
from train.objective import States, guided_prediction, rollout_states, without_nan
from train.rollout import Trajectory, rollout
from train.transitions import Transition


@dataclass(frozen=True, slots=True)
class GroupRollout:
    """Samples of this process: the groups of its prompts one after the other."""

    trajectory: Trajectory
    log_densities: list[Tensor]
    """Of each step but the last, (B,), when it was sampled."""
    advantages_B: Tensor
    rewards_B: Tensor
    prompts: list[str]
    cond: Conditions
    uncond: Conditions | None
    transitions: Sequence[Transition]

    def states(self, index: int) -> States:
        """Returns the states before a step."""
        return rollout_states(self.trajectory, [index], self.cond, self.uncond, self.prompts)


def group_rollout(step: Step, transitions: Sequence[Transition]) -> GroupRollout:
    """Samples groups with noise in their steps, and scores the final images.

    `transitions` are those of all steps but the last, which ends at x0-hat.
    """
    o, config, rng = step.objective, step.config.grpo, step.randomness.generator(8)
    chosen, noise = step.prompts_and_noise(o.prompt_batch, rng)
    prompts = [prompt for prompt in chosen for _ in range(config.group)]
    if config.same_noise:
        noise = noise.repeat_interleave(config.group, dim=0)
    else:
        noise = step.normal(len(prompts), rng)
    noises = [step.normal(len(prompts), rng) for _ in transitions]
    cond, uncond = cfg_conditions(step.base, step.inputs.encoder, prompts, o.guidance_scale)
    schedule = step.base.noise_schedule
    timesteps = schedule.timesteps(o.rollout_steps)
    densities: list[Tensor] = []

    def move(index: int, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        t, s = timesteps[index], timesteps[index + 1]
        found = transitions[index](schedule, x, x0, eps, t, s)
        x_next = found.sample(noises[index])
        densities.append(found.log_density(x_next) if found.std else torch.zeros_like(x[:, 0, 0, 0]))
        return x_next

    with step.autocast():
        trajectory = rollout(
            step.base, step.adapter, step.schedule, cond, uncond, noise,
            steps=o.rollout_steps, guidance_scale=o.guidance_scale, move=move,
        )  # fmt: skip
        rewards_B = final_rewards(step, trajectory.final, prompts)
    advantages_B = group_advantages(rewards_B, config.group, config.advantage_clip)
    return GroupRollout(trajectory, densities, advantages_B, rewards_B, prompts, cond, uncond, transitions)


@torch.no_grad()
def final_rewards(step: Step, latents: Tensor, prompts: Sequence[str]) -> Tensor:
    """Returns R of the final images (B,), NaN where an image is not finite."""
    images, finite_B = without_nan(step.base.decode(latents).float())
    total, _ = step.inputs.rewards(images, prompts)
    return torch.where(finite_B, total, torch.nan)


def group_advantages(rewards_B: Tensor, group: int, clip: float) -> Tensor:
    """Returns (R - mean) / (std + 1e-8) within groups of neighbours, clipped; 0 where R is NaN."""
    rewards_GN = rewards_B.view(-1, group)
    mean_G1 = rewards_GN.nanmean(dim=1, keepdim=True)
    from_mean_GN = torch.nan_to_num(rewards_GN - mean_G1)
    count_G1 = (~rewards_GN.isnan()).sum(dim=1, keepdim=True)
    std_G1 = (from_mean_GN.square().sum(dim=1, keepdim=True) / (count_G1 - 1).clamp(min=1)).sqrt()
    return (from_mean_GN / (std_G1 + 1e-8)).clamp(-clip, clip).flatten()


def clipped_loss(ratio_B: Tensor, advantages_B: Tensor, clip_range: float) -> Tensor:
    """Returns the mean of max(-A r, -A clip(r))."""
    clipped_B = ratio_B.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(-advantages_B * ratio_B, -advantages_B * clipped_B).mean()


def group_updates(
    step: Step, found: GroupRollout, trained: Callable[[int], Sequence[int]]
) -> Iterator[StepMetrics]:
    """Adds the gradients of the clipped loss, for one share of the samples after the other.

    `trained` gives the trained steps of a sample. Each update's samples come from all groups in turn.
    """
    config, count = step.config.grpo, len(found.prompts)
    order = [n for start in range(config.updates) for n in range(start, count, config.updates)]
    size = count // config.updates
    for first in range(0, size * config.updates, size):
        yield _update(step, found, order[first : first + size], trained)


def _update(
    step: Step, found: GroupRollout, samples: Sequence[int], trained: Callable[[int], Sequence[int]]
) -> StepMetrics:
    """Adds the gradient of some samples' steps."""
    jobs: dict[int, list[int]] = {}
    for sample in samples:
        for index in trained(sample):
            jobs.setdefault(index, []).append(sample)
    total = sum(map(len, jobs.values()))
    losses, ratios = list[Tensor](), list[Tensor]()
    for index, rows in sorted(jobs.items()):
        states = found.states(index)
        for part, _ in step.micro_batches(len(rows)):
            own = rows[part]
            ratio_B = ratio_of(step, found, states.rows(own), index, own)
            share = len(own) / total
            loss = clipped_loss(ratio_B, found.advantages_B[own], step.config.grpo.clip_range)
            step.backward(step.objective.reward_weight * share * loss)
            losses.append(share * loss.detach())
            ratios.append(ratio_B.detach())
    away = (torch.cat(ratios) - 1.0).abs()
    return {
        "policy_loss": torch.stack(losses).sum(),
        "reward": found.rewards_B.nanmean(),
        "ratio_from_1": away.mean(),
        "clipped": (away > step.config.grpo.clip_range).float().mean(),
        "not_finite": found.rewards_B.isnan().float().mean(),
    }


def ratio_of(step: Step, found: GroupRollout, states: States, index: int, rows: Sequence[int]) -> Tensor:
    """Returns exp(log p - log p_rollout) of the sampled x of the next timestep, with its gradient."""
    o, schedule = step.objective, step.base.noise_schedule
    with step.autocast():
        output = guided_prediction(step.adapter, step.base, states, o.guidance_scale, o.conditional_only)
    x0, eps = schedule.predictions(states.x, output, states.t_B)
    t, s = found.trajectory.timesteps[index], found.trajectory.timesteps[index + 1]
    density = found.transitions[index](schedule, states.x, x0, eps, t, s)
    x_next = found.trajectory.states[index + 1][list(rows)]
    return (density.log_density(x_next) - found.log_densities[index][list(rows)]).exp()
