"""HyperAlign (arXiv 2601.15968): L = w_R L_R + w_G L_G (Eq 10), one loss after the other.

L_R (Eq 8) sends a reward's gradient through one step of the sampler; L_G (Eq 9) is the denoising loss on
preferred images, so that the reward is not hacked. With one weight zero it is the reward alone, or supervised
fine-tuning on preferred images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from train.methods.pairs import states_of
from train.methods.rewarded import RewardTally
from train.methods.step import Step, StepMetrics
from train.models.base import cfg_conditions
from train.objective import States, noised_states, preference_loss, reward_loss, rollout_states
from train.rollout import rollout


def hyperalign(step: Step) -> Iterator[StepMetrics]:
    """Adds the gradients of both losses."""
    metrics: StepMetrics = {}
    if step.objective.reward_weight:
        metrics |= reward_pass(step, rewarded_states(step))
    if step.objective.preference_weight:
        metrics |= preference_pass(step)
    yield metrics


def rewarded_states(step: Step) -> States:
    """Returns states of a rollout, of noised images, or of both in turn."""
    return _rollout_states(step) if step.state == "rollout" else _noised_states(step)


def reward_pass(step: Step, states: States) -> StepMetrics:
    """L_R through one step from these states (Eq 8)."""
    o, tally = step.objective, RewardTally()
    for part, share in step.micro_batches(len(states)):
        with step.autocast():
            loss, scores = reward_loss(
                step.adapter, step.base, step.inputs.rewards, states[part],
                guidance_scale=o.guidance_scale, cap=o.reward_cap, conditional_only=o.conditional_only,
                weighting=o.reward_weighting,
            )  # fmt: skip
        step.backward(o.reward_weight * share * loss)
        tally.add(loss, scores, share)
    return tally.metrics(step)


def preference_pass(step: Step) -> StepMetrics:
    """L_G on noised preference images (Eq 9)."""
    o = step.objective
    images = step.preference_images(
        o.preference_batch, o.preference_range, purpose=2, dropout=step.caption_dropout
    )
    states = states_of(step, images)
    losses, before = list[Tensor](), step.gradient()
    for part, share in step.micro_batches(len(states)):
        with step.autocast():
            x0, eps = images.x0[part], images.eps[part]
            loss = preference_loss(step.adapter, step.base, x0, eps, states[part], o.snr_gamma)
        step.backward(o.preference_weight * share * loss)
        losses.append(share * loss.detach())
    added = step.gradient() - before
    return {"preference_loss": torch.stack(losses).sum(), "grad_norm_preference": added.norm()}


def _rollout_states(step: Step) -> States:
    """Samples prompts with the current hypernetwork; returns the states before some of the steps."""
    o, rng = step.objective, step.randomness.generator(1)
    prompts, noise = step.prompts_and_noise(o.prompt_batch, rng)
    choices = np.arange(o.skip_first, o.rollout_steps)
    picks = sorted(rng.choice(choices, o.timesteps, replace=False).tolist())
    cond, uncond = cfg_conditions(step.base, step.inputs.encoder, prompts, o.guidance_scale)
    with step.autocast():
        trajectory = rollout(
            step.base, step.adapter, step.schedule, cond, uncond, noise,
            steps=o.rollout_steps, guidance_scale=o.guidance_scale, until=max(picks),
        )  # fmt: skip
    return rollout_states(trajectory, picks, cond, uncond, prompts)


def _noised_states(step: Step) -> States:
    """Returns noised preference images."""
    o = step.objective
    images = step.preference_images(o.prompt_batch * o.timesteps, o.reward_range, purpose=3)
    cond, uncond = cfg_conditions(step.base, step.inputs.encoder, images.captions, o.guidance_scale)
    return noised_states(step.base, step.schedule, images, cond, uncond)
