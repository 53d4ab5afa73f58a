"""SPO: step-aware preference optimisation (Liang et al. 2024, arXiv 2406.04314).

A rollout draws several candidates for the next x from each x_t, and a preference model that knows the
timestep scores their one-step predictions. The best (w) and the worst (l) are a pair if softmax gives them
probabilities that differ by more than a threshold; a random candidate goes on. With
r = log p(x_s | x_t) - log p_ref(x_s | x_t), clipped to log(1 - c) to log(1 + c), the loss is the mean of
-log sigmoid(beta (r_w - r_l)) over an update's pairs: those of whole steps, in random order, where the
authors' batches mix the steps. Log-densities are means over dimensions.

Scores are in logits: a difference of 1 is odds of e to 1. `spo.step_reward` is a step-aware model's file;
without one the recipe's rewards, times `spo.reward_scale`, score the predictions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.methods.step import Step, StepMetrics
from train.models.base import cfg_conditions
from train.models.fsdp import uses_fsdp
from train.objective import States, guided_prediction, rollout_states, without_nan
from train.processes import mean_tensor
from train.rollout import Trajectory, generation_steps
from train.transitions import Gaussian, stochastic


@dataclass(frozen=True, slots=True)
class StepPairs:
    """The pairs of one step of a rollout: x of the next timestep."""

    index: int
    states: States
    preferred: Tensor
    rejected: Tensor
    counts_B: Tensor
    """1 for a pair, 0 for two candidates that are none."""


class Candidate(NamedTuple):
    """An x of the next timestep, its one-step prediction, and its score (B,)."""

    x: Tensor
    x0: Tensor
    eps: Tensor
    score_B: Tensor


def spo(step: Step) -> Iterator[StepMetrics]:
    """Adds the gradients of a rollout's pairs, those of a few of its steps after the other."""
    with torch.no_grad():
        walk = Walk(step)
        found = walk.pairs()
    updates = min(step.config.spo.updates, walk.compared_steps)
    order = walk.rng.permutation(walk.compared_steps) % updates
    for number in range(updates):
        share = [one for one in found if order[one.index - walk.first] == number]
        most = len(walk.prompts) * int((order == number).sum())
        yield _update(step, share, most) | {"reward": walk.last_score}


def _update(step: Step, found: list[StepPairs], most: int) -> StepMetrics:
    """Adds the gradient of the loss on pairs, of which there are at most `most`, and may be none."""
    config, nothing = step.config.spo, torch.zeros((), device=step.device)
    pairs = sum((one.counts_B.sum() for one in found), nothing)
    shared, loss, right = mean_tensor(pairs, step.accelerator).to(step.device), nothing, nothing
    for one in found:
        for part, _ in step.micro_batches(len(one.states)):
            own = log_ratios(step, one, part)
            weight_B = one.counts_B[part] / shared.clamp(min=1.0 / step.accelerator.num_processes)
            part_loss = (weight_B * spo_loss(*own, config.beta, config.clip_range)).sum()
            step.backward(step.objective.reward_weight * part_loss)
            loss = loss + part_loss.detach()
            right = right + (weight_B * (own[0] > own[1])).sum()
    return {"policy_loss": loss, "pairs_right": right, "pairs_kept": pairs / most}


def spo_loss(preferred_B: Tensor, rejected_B: Tensor, beta: float, clip_range: float) -> Tensor:
    """Returns -log sigmoid(beta (r_w - r_l)) (B,) of log-ratios; log 2 where the model is the base model."""
    low, high = math.log(1.0 - clip_range), math.log(1.0 + clip_range)
    return -F.logsigmoid(beta * (preferred_B.clamp(low, high) - rejected_B.clamp(low, high)))


def log_ratios(step: Step, pairs: StepPairs, part: slice) -> tuple[Tensor, Tensor]:
    """Returns log p - log p_ref (B,) of the preferred and of the rejected x, with their gradient."""
    own = density(step, pairs, part)
    with torch.no_grad():
        reference = density(step, pairs, part, reference=True)
    won, lost = (
        own.log_density(x[part]) - reference.log_density(x[part]) for x in (pairs.preferred, pairs.rejected)
    )
    return won, lost


def density(step: Step, pairs: StepPairs, part: slice, reference: bool = False) -> Gaussian:
    """Returns the next timestep's distribution by the adapted model, or by the base model."""
    timesteps = step.base.noise_schedule.timesteps(step.objective.rollout_steps)
    states, (t, s) = pairs.states[part], timesteps[pairs.index : pairs.index + 2]
    return transition(step, states.x, *predictions(step, states, reference), t, s)


def transition(step: Step, x: Tensor, x0: Tensor, eps: Tensor, t: float, s: float) -> Gaussian:
    """Returns the distribution of the next timestep's x."""
    schedule = step.base.noise_schedule
    return stochastic(schedule, step.config.spo.eta)(schedule, x, x0, eps, t, s)


def predictions(step: Step, states: States, reference: bool = False) -> tuple[Tensor, Tensor]:
    """Returns guided x0-hat and eps-hat by the adapted model, or by the base model."""
    o, adapter = step.objective, None if reference else step.adapter
    with step.autocast():
        output = guided_prediction(adapter, step.base, states, o.guidance_scale, o.conditional_only)
    return step.base.noise_schedule.predictions(states.x, output, states.t_B)


def scores(step: Step, x0: Tensor, t: float, prompts: list[str]) -> Tensor:
    """Returns the scores of one-step predictions at t in logits (B,), NaN where an image is not finite."""
    images, finite_B = without_nan(step.base.decode(x0).float())
    judge = step.inputs.step_reward
    if judge is None:
        score_B = step.config.spo.reward_scale * step.inputs.rewards(images, prompts)[0]
    else:
        u = t / step.base.noise_schedule.last_timestep
        score_B = judge(images, prompts, torch.full((len(prompts),), u, device=images.device))
    return torch.where(finite_B, score_B, torch.nan)


class Walk:
    """A rollout that draws candidates; a prediction is made once for each of them, and the one's goes on."""

    def __init__(self, step: Step) -> None:
        o, schedule = step.objective, step.base.noise_schedule
        self.step, self.rng = step, step.randomness.generator(13)
        self.prompts, self.noise = step.prompts_and_noise(o.prompt_batch, self.rng)
        encoder = step.inputs.encoder
        self.cond, self.uncond = cfg_conditions(step.base, encoder, self.prompts, o.guidance_scale)
        self.timesteps = schedule.timesteps(o.rollout_steps)
        self.first = step.config.spo.first_step(o.rollout_steps)
        self.compared_steps = o.rollout_steps - 1 - self.first
        self.generated_at = generation_steps(
            step.schedule, [t / schedule.last_timestep for t in self.timesteps]
        )
        self.visited: list[Tensor] = []
        self.last_score = torch.zeros((), device=step.device)  # mean of the last candidates

    def pairs(self) -> list[StepPairs]:
        """Samples; returns the pairs of each step, without the steps that have none."""
        x, found = self.noise, list[StepPairs]()
        x0, eps = predictions(self.step, self._states(x))
        for index in range(len(self.timesteps) - 1):
            t, s = self.timesteps[index : index + 2]
            states, following = self._states(x), transition(self.step, x, x0, eps, t, s)
            self.visited.append(x)
            if index < self.first:
                x = following.sample(self._noise())
                x0, eps = predictions(self.step, self._states(x))
                continue
            drawn = [self._candidate(following, s) for _ in range(self.step.config.spo.candidates)]
            pairs = self._compared(index, states, drawn)
            found += [] if pairs is None else [pairs]
            chosen_B = (len(drawn) * self.step.chances(len(x), self.rng)).long()
            x, x0, eps, _ = (_picked(tensors, chosen_B) for tensors in zip(*drawn, strict=True))
        return found

    def _candidate(self, following: Gaussian, s: float) -> Candidate:
        x = following.sample(self._noise())
        x0, eps = predictions(self.step, self._states(x))
        return Candidate(x, x0, eps, scores(self.step, x0, s, self.prompts))

    def _compared(self, index: int, states: States, drawn: list[Candidate]) -> StepPairs | None:
        """Returns the best and the worst candidates that are far enough apart, None if none are."""
        score_KB = torch.stack([one.score_B for one in drawn])
        self.last_score = score_KB.nanmean()
        kept_B = score_KB.amax(dim=0) - score_KB.amin(dim=0) > self.step.config.spo.least_gap
        # Processes that share a sharded model wait for each other in every pass, and take as many.
        all_rows = uses_fsdp(self.step.accelerator)
        rows: list[int] = torch.nonzero(torch.ones_like(kept_B) if all_rows else kept_B).flatten().tolist()
        best, worst = (
            _picked([one.x for one in drawn], of(dim=0))[rows] for of in (score_KB.argmax, score_KB.argmin)
        )
        return StepPairs(index, states.rows(rows), best, worst, kept_B[rows].float()) if rows else None

    def _noise(self) -> Tensor:
        return self.step.normal(len(self.prompts), self.rng)

    def _states(self, x: Tensor) -> States:
        """Returns the states behind the visited ones, whose weights are generated as in sampling."""
        trajectory = Trajectory([*self.visited, x], self.timesteps, self.generated_at, 0, [], x)
        return rollout_states(trajectory, [len(self.visited)], self.cond, self.uncond, self.prompts)


def _picked(candidates: tuple[Tensor, ...] | list[Tensor], chosen_B: Tensor) -> Tensor:
    """Returns of K tensors (B, ...) the rows of the chosen one of each."""
    return torch.stack(list(candidates))[chosen_B, torch.arange(len(chosen_B), device=chosen_B.device)]
