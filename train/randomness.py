"""The random numbers of a training step, decided by (seed, step) for the whole batch of all processes.

Every process generates the same numbers and takes its slice. So a resumed run repeats them exactly without
any saved random state, and two processes use what one process with twice the batch would use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hyperalign.families.unet import LAST_TIMESTEP
from train.config import TimestepSampling


@dataclass(frozen=True, slots=True)
class StepRandomness:
    """The random numbers of one step, and this process's part of them."""

    seed: int
    step: int
    process: int = 0
    processes: int = 1

    def generator(self, *purpose: int) -> np.random.Generator:
        """Returns the generator for one purpose, the same in every process."""
        return np.random.default_rng((self.seed, self.step, 0, *purpose))

    def part(self, per_process: int) -> slice:
        """Returns which samples of the whole batch are this process's."""
        return slice(self.process * per_process, (self.process + 1) * per_process)


def normal(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Returns standard normal noise, decided by `rng`, on the CPU."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return torch.randn(shape, generator=generator)


def sample_u(
    count: int, bounds: tuple[float, float], sampling: TimestepSampling, rng: np.random.Generator
) -> Tensor:
    """Returns timesteps as fractions u (count,) inside `bounds`.

    `uniform` samples whole timesteps, as diffusion models have them; `logit_normal` is a sigmoid of a
    standard normal number (Esser et al. 2024, eq 19), scaled to the bounds.
    """
    low, high = bounds
    if sampling == "logit_normal":
        u = 1.0 / (1.0 + np.exp(-rng.standard_normal(count)))
        return torch.from_numpy(low + (high - low) * u).float()
    steps = rng.integers(round(low * LAST_TIMESTEP), round(high * LAST_TIMESTEP) + 1, size=count)
    return torch.from_numpy(steps) / LAST_TIMESTEP
