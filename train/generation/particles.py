"""Tempered sequential Monte Carlo (DAS: Kim et al. 2025, arXiv 2501.05803).

Samples of p(x0) exp(R(x0) / alpha) by K particles that run down a stochastic sampler together. Each step is
moved along the reward's gradient; weights make up for that, and particles of little weight are replaced by
copies of others. The reward comes in gradually (tempering).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.transitions import Gaussian

RESAMPLE_BELOW = 0.5
"""Particles are resampled where the effective number of them falls below this share."""
TEMPERED_SHARE = 0.87
"""Share of a run after which the reward counts in full (the authors' 87 of 100 steps)."""


class Predicted(NamedTuple):
    """What a step knows of its particles (K, ...)."""

    transition: Gaussian
    """The sampler's own next step."""
    reward_K: Tensor
    """R / alpha of the one-step predictions."""
    gradient: Tensor
    """Its gradient to x."""


class Particles(NamedTuple):
    """What a run ends with."""

    x: Tensor
    log_weights_K: Tensor
    """Normalised."""
    rewards_K: Tensor
    """R / alpha."""
    log_evidence: float
    """Estimate of log E exp(R / alpha)."""

    def best(self) -> int:
        """Returns the particle with the greatest weight, and of several the one with the greatest reward."""
        return int((self.log_weights_K + 1e-6 * self.rewards_K).argmax())


def tempering(steps: int) -> list[float]:
    """Returns the reward's share at each step and at the end: min((1 + gamma)^i - 1, 1), from 0 to 1."""
    growth = 2.0 ** (1.0 / max(1.0, TEMPERED_SHARE * steps))
    return [min(growth**index - 1.0, 1.0) for index in range(steps)] + [1.0]


def particle_run(
    x: Tensor,
    steps: int,
    predict: Callable[[Tensor, int], Predicted],
    final_reward: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    rng: np.random.Generator,
) -> Particles:
    """Runs particles down a sampler.

    Args:
        x: the initial noise of the particles (K, ...).
        steps: of the sampler.
        predict: x and the index of a step -> what is known there.
        final_reward: R / alpha (K,) of what the last step ends with.
        generator: of the steps' noise.
        rng: of the resampling.
    """
    shares = tempering(steps)
    log_w_K, log_evidence = torch.full((len(x),), -float(np.log(len(x)))).to(x), 0.0
    before_K, moved_K = torch.zeros_like(log_w_K), torch.zeros_like(log_w_K)
    for index in range(steps):
        found = predict(x, index)
        log_w_K = log_w_K + moved_K + shares[index] * found.reward_K - before_K
        total = torch.logsumexp(log_w_K, dim=0)
        log_w_K, log_evidence = log_w_K - total, log_evidence + float(total)
        if effective_number(log_w_K) < RESAMPLE_BELOW * len(x):
            kept = torch.from_numpy(offspring(log_w_K.exp().double().cpu().numpy(), rng)).to(x.device)
            mean, std = found.transition
            found = Predicted(Gaussian(mean[kept], std), found.reward_K[kept], found.gradient[kept])
            log_w_K = torch.full_like(log_w_K, -float(np.log(len(x))))
        before_K = shares[index] * found.reward_K
        x, moved_K = guided_step(found, shares[index + 1], generator)
    rewards_K = final_reward(x)
    log_w_K = log_w_K + moved_K + rewards_K - before_K
    total = torch.logsumexp(log_w_K, dim=0)
    return Particles(x, log_w_K - total, rewards_K, log_evidence + float(total))


def guided_step(found: Predicted, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns x' = mean + std z + std^2 share gradient, and log p(x') - log q(x') of each particle (K,).

    The sampler's own density p and the moved one q differ by -share std <g, z> - share^2 std^2 |g|^2 / 2.
    """
    mean, std = found.transition
    z = torch.randn(mean.shape, generator=generator).to(mean)
    pull = share * std * found.gradient
    moved_K = -(pull * z).flatten(1).sum(dim=1) - 0.5 * pull.square().flatten(1).sum(dim=1)
    return mean + std * (z + pull), moved_K


def effective_number(log_weights_K: Tensor) -> float:
    """Returns 1 / sum w^2 of normalised weights, from 1 to K."""
    return float((-torch.logsumexp(2.0 * log_weights_K, dim=0)).exp())


def offspring(weights_K: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Returns the particle that each place gets: floor(K w) or one more copies of each, K w on average.

    The Srinivasan sampling process (Gerber, Chopin and Whiteley 2019, arXiv 1708.02230, algorithm 2) rounds
    two fractions at a time.
    """
    count = len(weights_K)
    expected = count * weights_K / weights_K.sum()
    copies = np.floor(expected).astype(np.int64)
    rest = expected - copies
    first = 0
    for second in range(1, count):
        first = _round_one(rest, copies, first, second, rng)
    short = count - int(copies.sum())  # the last fraction, 0 or 1 up to rounding
    copies[first] += short
    return np.repeat(np.arange(count), copies)


def _round_one(
    rest: NDArray[np.float64], copies: NDArray[np.int64], i: int, j: int, rng: np.random.Generator
) -> int:
    """Moves the fractions of two particles until one of them is 0 or 1; returns the other one."""
    up, down = min(1.0 - rest[i], rest[j]), min(rest[i], 1.0 - rest[j])
    if up + down == 0.0:
        return j
    change = up if rng.random() * (up + down) < down else -down
    rest[i] += change
    rest[j] -= change
    left = i
    for done, other in ((i, j), (j, i)):
        if rest[done] <= 1e-12 or rest[done] >= 1.0 - 1e-12:
            copies[done] += round(rest[done])
            rest[done] = 0.0
            left = other
            break
    return left
