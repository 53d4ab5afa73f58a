"""What a step of each method takes: the budget that comparisons hold equal, and what estimates count."""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Passes:
    """Samples that pass the backbone; the two passes of a guided one both count."""

    forwards: float
    backwards: float

    @property
    def total(self) -> float:
        """Samples that pass it either way.

        The backbone's weights are frozen, so that a pass backwards takes about as many operations as one
        forwards: 0.8 of them in SD 1.5, 1.1 in FLUX.1.
        """
        return self.forwards + self.backwards

    def times(self, count: float) -> Passes:
        """Returns those of several steps or images."""
        return Passes(count * self.forwards, count * self.backwards)


@dataclass(frozen=True, slots=True)
class StepPasses:
    """Passes of one step in one process, in samples; a guided one is two where CFG needs the empty prompt."""

    sampled: float = 0.0
    """Guided samples without gradient, through the adapted model or the base model, one for each step of a
    sampler."""
    guided: float = 0.0
    """Guided samples with gradient."""
    denoised: float = 0.0
    """Samples without guidance, with gradient."""
    compared: float = 0.0
    """Samples without guidance or gradient, through the base model or the adapted one."""
    scored: float = 0.0
    """Images through decoder and rewards, with gradient."""
    judged: float = 0.0
    """The same without gradient."""
    rollouts: int = 0
    """Images that are sampled at once."""
    reward_batch: int = 0
    """Images of the reward's backward passes, which micro-batches divide."""
    graph_steps: int = 1
    """Steps of a sampler in the graph of one of them."""
    preference_batch: int = 0
    """Images, or pairs, of the preference loss, which micro-batches divide."""
    pair: int = 1
    """Samples of one of them."""
    updates: int = 1
    """Updates of the network."""

    @property
    def largest_batch(self) -> int:
        """Images of the loss that has more of them."""
        return max(self.reward_batch, self.preference_batch)

    def forwards(self, cfg: bool) -> float:
        """Returns the samples that pass the backbone forwards."""
        return (1 + cfg) * (self.sampled + self.guided) + self.denoised + self.compared

    def backwards(self, cfg: bool) -> float:
        """Returns the samples that pass it backwards."""
        return (1 + cfg) * self.guided + self.denoised

    def of_backbone(self, cfg: bool) -> Passes:
        """Returns both."""
        return Passes(self.forwards(cfg), self.backwards(cfg))


def step_passes(config: TrainConfig) -> StepPasses:
    """Returns the mean passes of a step of a recipe's method."""
    match config.objective.method:
        case "hyperalign":
            return _hyperalign(config)
        case "alignprop":
            return _alignprop(config)
        case "dpo" | "kto":
            return _paired(config)
        case "srpo":
            return _srpo(config)
        case "spo":
            return _spo(config)
        case "dance_grpo" | "mix_grpo":
            return _grouped(config)


def _hyperalign(config: TrainConfig) -> StepPasses:
    o = config.objective
    rewarded = o.prompt_batch * o.timesteps * bool(o.reward_weight)
    preferred = o.preference_batch * bool(o.preference_weight)
    rolled = _rolled(config) * bool(o.reward_weight)
    return StepPasses(
        sampled=rolled * rollout_share(config) * o.prompt_batch * o.rollout_steps, guided=rewarded,
        denoised=preferred, scored=rewarded, rollouts=o.prompt_batch * bool(rolled),
        reward_batch=rewarded, preference_batch=preferred,
    )  # fmt: skip


def _alignprop(config: TrainConfig) -> StepPasses:
    o, own = config.objective, config.alignprop
    mean = min(max(1.0, own.mean_share * o.rollout_steps), o.rollout_steps - 1.0)
    last = float(own.last_steps or mean)
    most = own.last_steps or min(o.rollout_steps - 1, math.ceil(mean + 2 * own.std_share * o.rollout_steps))
    return StepPasses(
        sampled=o.prompt_batch * (o.rollout_steps - last), guided=o.prompt_batch * last,
        scored=o.prompt_batch, rollouts=o.prompt_batch, reward_batch=o.prompt_batch, graph_steps=most,
    )  # fmt: skip


def _paired(config: TrainConfig) -> StepPasses:
    o = config.objective
    pair = 2 if o.method == "dpo" else 1
    compared = 2 * o.preference_batch  # DPO: both images by the base model; KTO: one by both models
    return StepPasses(
        denoised=pair * o.preference_batch, compared=compared, preference_batch=o.preference_batch, pair=pair
    )


def _srpo(config: TrainConfig) -> StepPasses:
    o, rolled = config.objective, _rolled(config)
    return StepPasses(
        sampled=rolled * o.prompt_batch * o.rollout_steps, guided=2 * o.prompt_batch,
        scored=4 * o.prompt_batch, rollouts=o.prompt_batch * bool(rolled), reward_batch=o.prompt_batch,
    )  # fmt: skip


def _grouped(config: TrainConfig) -> StepPasses:
    o, grpo = config.objective, config.grpo
    samples, steps = o.prompt_batch * grpo.group, o.rollout_steps - 1
    trained = max(1, int(steps * grpo.trained_share))
    if o.method == "mix_grpo":
        trained = min(grpo.window, steps)
    return StepPasses(
        sampled=samples * o.rollout_steps, guided=samples * trained, judged=samples, rollouts=samples,
        reward_batch=samples // grpo.updates, updates=grpo.updates,
    )  # fmt: skip


def _spo(config: TrainConfig) -> StepPasses:
    """Returns the most: every candidates' gap is above the threshold."""
    o, spo = config.objective, config.spo
    first = spo.first_step(o.rollout_steps)
    compared = o.rollout_steps - 1 - first
    reference = compared
    return StepPasses(
        sampled=o.prompt_batch * (1 + first + spo.candidates * compared + reference),
        guided=o.prompt_batch * compared, judged=o.prompt_batch * spo.candidates * compared,
        rollouts=o.prompt_batch, reward_batch=o.prompt_batch, updates=min(spo.updates, compared),
    )  # fmt: skip


def _rolled(config: TrainConfig) -> float:
    """Returns the share of steps that sample images."""
    return {"rollout": 1.0, "mixed": 0.5, "noised": 0.0}[config.objective.state]


def rollout_share(config: TrainConfig) -> float:
    """Returns the mean share of a rollout that is run: the steps before the last one with a gradient.

    The greatest of k numbers sampled from 1 to n has the mean k (n + 1) / (k + 1).
    """
    o = config.objective
    room = o.rollout_steps - o.skip_first
    return (o.skip_first + o.timesteps * (room + 1) / (o.timesteps + 1) - 1) / o.rollout_steps
