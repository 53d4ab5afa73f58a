"""Test-time search over initial noise: the sampling baselines of the paper.

- `best-of-N`: N fresh noises; the best image is kept (arXiv 2501.09732, random search).
- `zero-order`: rounds of candidates near the best noise so far (arXiv 2501.09732, zero-order search).
- `epsilon-greedy`: the same, but each candidate is fresh with probability epsilon, which is the rule of
  arXiv 2506.03164 applied to the initial noise, so that it works with every sampler.
- `epsilon-greedy-steps`: arXiv 2506.03164 itself, the baseline that the paper calls epsilon-greedy: fresh
  initial noises as in `best-of-N`, and `epsilon_greedy` for the noise of every denoising step.

Candidate i has the seed `seed + i`, so the same settings give the same images.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from torch import Tensor

from .errors import HyperAlignError

SearchMode = Literal["best-of-N", "epsilon-greedy", "zero-order", "epsilon-greedy-steps"]
MODES: tuple[SearchMode, ...] = ("best-of-N", "epsilon-greedy", "zero-order", "epsilon-greedy-steps")
SEEDS = 1 << 64

Sample = TypeVar("Sample")
Neighbour = Callable[[Tensor, Tensor, float], Tensor]
"""Pivot, fresh noise and a radius, as a fraction of fresh noise -> noise at most that far from the pivot."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of a search.

    Raises HyperAlignError on a value out of range.
    """

    count: int
    """Candidates in all."""
    seed: int = 0
    mode: SearchMode = "best-of-N"
    batch: int = 1
    """Candidates sampled at once."""
    keep: int = 1
    """How many of the best samples are kept."""
    stop_at: float = math.inf
    """The search ends with the first score that reaches it."""
    round_size: int = 4
    """Candidates near one noise, before the search moves to the best."""
    radius: float = 0.5
    """Distance of candidates from it, as a fraction of fresh noise."""
    epsilon: float = 0.4
    """Probability that a candidate of `epsilon-greedy` or `epsilon-greedy-steps` is fresh."""
    iterations: int = 4
    """Rounds of `round_size` candidates for the noise of each step in `epsilon-greedy-steps`."""

    def __post_init__(self) -> None:
        for name in ("count", "batch", "keep", "round_size", "iterations"):
            if getattr(self, name) < 1:
                raise HyperAlignError(f"{name} is {getattr(self, name)}; expected at least 1. Use 1 or more.")
        if not 0.0 < self.radius < math.inf or not 0.0 <= self.epsilon <= 1.0 or math.isnan(self.stop_at):
            raise HyperAlignError(
                f"radius is {self.radius}, epsilon {self.epsilon} and the threshold {self.stop_at}; expected "
                "radius above 0, epsilon from 0 to 1 and a number. 0.5 and 0.4 are usual."
            )


@dataclass(frozen=True, slots=True)
class Candidate:
    """An initial noise (1, ...) and its seed."""

    seed: int
    noise: Tensor


@dataclass(frozen=True, slots=True)
class Scored(Generic[Sample]):
    """The sample of a candidate and its score."""

    score: float
    seed: int
    sample: Sample


class Search(Generic[Sample]):
    """A search in progress; it may be stopped at any time, and keeps at most `keep` samples.

    Args:
        plan: the settings.
        fresh: noise (1, ...) of a seed, standard normal.
    """

    def __init__(self, plan: Plan, fresh: Callable[[int], Tensor]) -> None:
        self.kept: list[Scored[Sample]] = []
        """The best so far, best first."""
        self.tried: list[tuple[int, float]] = []
        """Seed and score of every candidate so far; NaN or infinite for those that failed."""
        self._plan = plan
        self._fresh = fresh
        self._pivot: Tensor | None = None
        self._leader: tuple[float, Tensor] | None = None

    def propose(self) -> list[Candidate]:
        """Returns the candidates to sample next; none when the search is over."""
        plan, done = self._plan, len(self.tried)
        if done >= plan.count or (self.kept and self.kept[0].score >= plan.stop_at):
            return []
        count = min(plan.batch, plan.count - done)
        if plan.mode == "epsilon-greedy-steps":  # the search inside each candidate uses the batch
            count = 1
        elif plan.mode != "best-of-N":  # all candidates of a round are near the same noise
            count = min(count, plan.round_size - done % plan.round_size)
        seeds = [(plan.seed + done + index) % SEEDS for index in range(count)]
        return [Candidate(seed, self._noise(seed)) for seed in seeds]

    def record(
        self, candidates: Sequence[Candidate], scores: Sequence[float], samples: Sequence[Sample]
    ) -> None:
        """Adds the scores and samples of proposed candidates.

        A candidate whose score is NaN or infinite has failed: it is neither kept nor searched near.
        """
        for candidate, score, sample in zip(candidates, scores, samples, strict=True):
            self.tried.append((candidate.seed, score))
            if not math.isfinite(score):
                continue
            self.kept.append(Scored(score, candidate.seed, sample))
            if self._leader is None or score > self._leader[0]:
                self._leader = score, candidate.noise
        self.kept = sorted(self.kept, key=lambda scored: -scored.score)[: self._plan.keep]
        if len(self.tried) % self._plan.round_size == 0 and self._leader is not None:
            self._pivot = self._leader[1]

    def _noise(self, seed: int) -> Tensor:
        plan, fresh = self._plan, self._fresh(seed)
        explores = plan.mode == "epsilon-greedy" and random.Random(seed).random() < plan.epsilon
        from_scratch = plan.mode in ("best-of-N", "epsilon-greedy-steps")
        if from_scratch or self._pivot is None or explores:
            return fresh
        return near(self._pivot, fresh, plan.radius)


def epsilon_greedy(
    plan: Plan,
    fresh: Callable[[], Tensor],
    score: Callable[[list[Tensor]], list[float]],
    rng: random.Random,
    neighbour: Neighbour | None = None,
    keep_best: bool = False,
) -> Tensor:
    """Returns the noise (1, ...) of one denoising step, searched as in arXiv 2506.03164.

    From a fresh pivot on, each of K rounds scores N candidates and moves to the best of them. A candidate is
    fresh with probability epsilon, or else at most `radius` from the pivot. The paper adds to the pivot
    a vector of up to lambda sqrt(d); `near` also rescales the sum, so that noise keeps its variance
    over any number of rounds.

    Args:
        plan: N = `round_size` (the paper has 4), K = `iterations` (20), `radius` (0.15), `epsilon` (0.4).
        fresh: standard normal noise (1, ...).
        score: scores of candidates, in their order; one that is NaN or infinite is never the best.
        rng: decides which candidates are fresh, and the distance of the others.
        neighbour: makes the others; None for `near`.
        keep_best: moves only to better candidates, where the paper forgets the pivot after each round.
    """
    beside = near if neighbour is None else neighbour
    pivot, reached = fresh(), -math.inf
    for _ in range(plan.iterations):
        candidates = [
            fresh() if rng.random() < plan.epsilon else beside(pivot, fresh(), plan.radius * rng.random())
            for _ in range(plan.round_size)
        ]
        scores = [value if math.isfinite(value) else -math.inf for value in score(candidates)]
        if not keep_best or max(scores) > reached:
            reached = max(scores)
            pivot = candidates[scores.index(reached)]
    return pivot


def near(pivot: Tensor, fresh: Tensor, radius: float) -> Tensor:
    """Returns noise near a pivot: (pivot + r fresh) / sqrt(1 + r^2), again standard normal."""
    return (pivot + radius * fresh) / math.sqrt(1.0 + radius**2)
