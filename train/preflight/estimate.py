"""What a recipe takes: operations, memory, time and disk. Arithmetic on the costs of its parts.

Every figure is an estimate before anything has run; benchmarks/training.py measures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from train.config import TrainConfig
from train.inputs import EVAL_SEEDS
from train.models.load import backbone_dtype
from train.preflight.parts import Parts

ASSUMED_SHARE = 0.4
"""Share of a large matrix product's rate that a whole step is assumed to reach."""
OPTIMISER_BYTES = 20
"""For each number of the hypernetwork, in float32: itself, gradient, AdamW's two moments, average."""
STATE_BYTES = 16
"""The same in a saved state, which has no gradient."""


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of one step in one process."""

    rollout: float
    reward: float
    """Both passes of the reward loss, with what checkpointing computes anew."""
    preference: float

    @property
    def total(self) -> float:
        """All of them; the optimiser's are too few to count."""
        return self.rollout + self.reward + self.preference


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device: what lies there all the time, and what each moment of a step adds."""

    weights: int
    """Frozen models."""
    optimiser: int
    """The hypernetwork with everything of AdamW."""
    rollout: int
    reward: int
    """The rewards' backward pass, while backbone and decoder wait for theirs."""
    decoder: int
    """The decoder's backward pass, while the backbone waits for its own."""
    backbone: int
    """The backbone's backward pass in the reward loss."""
    preference: int

    @property
    def moments(self) -> dict[str, int]:
        """The moments of a step; only one is at a time."""
        return {name: size for name, size in asdict(self).items() if name not in ("weights", "optimiser")}

    @property
    def peak(self) -> int:
        """What all of it needs at once."""
        return self.weights + self.optimiser + max(self.moments.values())


def rows_per_image(parts: Parts) -> int:
    """Returns how many rows the backbone needs for one image: 2 with classifier-free guidance."""
    return 2 if parts.guided_by_rows else 1


def generations(config: TrainConfig, steps: int) -> int:
    """Returns how often weights are written in a run: S always, I once, P at its key times too."""
    model = config.model
    count = {"S": steps, "P": 1 + (len(model.key_times) or model.key_count), "I": 1}[model.variant]
    return min(steps, count)


def sampling_work(config: TrainConfig, parts: Parts, images: int, steps: int) -> float:
    """Returns the operations of sampling latents, weights written by the schedule."""
    perceiving = parts.perception if config.model.mode == "separate" else 0.0
    writing = generations(config, steps) * (parts.generation.forward + perceiving)
    return images * rows_per_image(parts) * (steps * parts.sampling.forward + writing)


def gradient_work(config: TrainConfig, parts: Parts) -> float:
    """Returns the operations of one row forward and backward.

    Weights are written at the row's own time for S, and at an earlier one for P and I, which takes a
    pass of the perception blocks of its own.
    """
    apart = config.model.mode == "separate" or config.model.variant != "S"
    both = (parts.training, parts.generation)
    return sum(cost.forward + cost.backward for cost in both) + apart * parts.perception


def rolled_share(config: TrainConfig) -> float:
    """Returns the mean share of a rollout that is run: up to the last of its steps with a gradient.

    The greatest of k numbers drawn from 1 to n has the mean k (n + 1) / (k + 1).
    """
    o = config.objective
    room = o.rollout_steps - o.skip_first
    return (o.skip_first + o.timesteps * (room + 1) / (o.timesteps + 1)) / o.rollout_steps


def step_work(config: TrainConfig, parts: Parts) -> Work:
    """Returns the operations of one training step in one process."""
    o, rows, row = config.objective, rows_per_image(parts), gradient_work(config, parts)
    images = o.prompts * o.timesteps * bool(o.reward_weight)
    rolled = {"rollout": 1.0, "mixed": 0.5, "noised": 0.0}[o.state] * bool(o.reward_weight)
    guided = rows * row
    if o.conditional_only and rows == 2:
        guided = row + sampling_work(config, parts, 1, 1) / rows
    seen = sum(cost.forward + cost.backward for cost in (parts.decoding, parts.judging))
    return Work(
        rollout=rolled * rolled_share(config) * sampling_work(config, parts, o.prompts, o.rollout_steps),
        reward=images * (guided + seen),
        preference=o.preferred * bool(o.preference_weight) * row,
    )


def evaluation_work(config: TrainConfig, parts: Parts, processes: int = 1) -> float:
    """Returns the operations of one evaluation in each of the processes that share it."""
    if not config.eval.every:
        return 0.0
    images = max(1, config.eval.prompts // processes) * len(EVAL_SEEDS)
    shown = images * (parts.decoding.forward + parts.judging.forward)
    return sampling_work(config, parts, images, config.eval.steps) + shown


def step_seconds(
    config: TrainConfig, parts: Parts, rate: float, processes: int = 1, share: float = ASSUMED_SHARE
) -> float:
    """Returns the mean seconds of a step with its share of the evaluations.

    Args:
        config: the recipe.
        parts: what its step is made of.
        rate: operations a second of a large matrix product on each device.
        processes: how many share an evaluation.
        share: how much of that rate is reached.
    """
    evaluations = evaluation_work(config, parts, processes) / max(1, config.eval.every)
    return (step_work(config, parts).total + evaluations) / (rate * share)


def step_memory(config: TrainConfig, parts: Parts) -> Memory:
    """Returns the bytes of one step on one device; CUDA's own half gigabyte and scratch memory not counted.

    The graph of the backbone waits while the decoder runs, and both wait while the rewards run; the
    backward passes take them down in the other order.
    """
    o, rows = config.objective, rows_per_image(parts)
    images = _at_once(config, o.prompts * o.timesteps)
    graphs = images * (1 if o.conditional_only else rows)
    preferred = _at_once(config, o.preferred) * bool(o.preference_weight)
    row_peak = parts.training.peak + parts.generation.kept
    kept = graphs * (parts.training.kept + parts.generation.kept)
    rewarded, rolled = bool(o.reward_weight), o.state != "noised"
    return Memory(
        weights=frozen_bytes(config, parts),
        optimiser=OPTIMISER_BYTES * parts.parameters["hypernetwork"],
        rollout=rewarded * rolled * o.prompts * rows * parts.sampling.peak,
        reward=rewarded * (kept + images * (parts.decoding.kept + parts.judging.peak)),
        decoder=rewarded * (kept + images * parts.decoding.peak),
        backbone=rewarded * graphs * row_peak,
        preference=preferred * row_peak,
    )


def frozen_bytes(config: TrainConfig, parts: Parts) -> int:
    """Returns the bytes of the frozen models, watched rewards too."""
    frozen = sum(count for name, count in parts.parameters.items() if name != "hypernetwork")
    return backbone_dtype(config).itemsize * frozen


def states_bytes(config: TrainConfig, parts: Parts) -> int:
    """Returns the bytes that the saved states fill; one more than is kept while it is written."""
    return (config.run.keep + 1) * STATE_BYTES * parts.parameters["hypernetwork"]


def text_bytes(config: TrainConfig, parts: Parts) -> int:
    """Returns the bytes of one text's conditions on disk, at all paddings together."""
    return backbone_dtype(config).itemsize * sum(parts.text_numbers)


def _at_once(config: TrainConfig, images: int) -> int:
    """Returns how many images one backward pass holds."""
    return min(config.objective.micro_batch or images, images)
