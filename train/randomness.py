"""Everything random in a step, drawn from (seed, step) alone for the whole batch of all processes.

A process takes its slice of what all draw alike. So a resumed run goes on exactly, and two processes
draw what one with twice the batch draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hyperalign.families.unet import LAST_TIMESTEP
from train.config import TimeLaw


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of one step."""

    seed: int
    step: int
    process: int = 0
    processes: int = 1

    def generator(self, *purpose: int) -> np.random.Generator:
        """Returns the source for one purpose, the same in every process."""
        return np.random.default_rng((self.seed, self.step, 0, *purpose))

    def part(self, per_process: int) -> slice:
        """Returns this process's rows of the whole batch."""
        return slice(self.process * per_process, (self.process + 1) * per_process)


def normal(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Returns standard normal noise, decided by `rng`, on the CPU."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return torch.randn(shape, generator=generator)


def times(rows: int, bounds: tuple[float, float], law: TimeLaw, rng: np.random.Generator) -> Tensor:
    """Returns normalised times u (rows,) inside `bounds`.

    `uniform` draws whole timesteps, as diffusion models know them; `logit_normal` is a sigmoid of
    a standard normal number (Esser et al. 2024, eq 19), spread over the bounds.
    """
    low, high = bounds
    if law == "logit_normal":
        u = 1.0 / (1.0 + np.exp(-rng.standard_normal(rows)))
        return torch.from_numpy(low + (high - low) * u).float()
    steps = rng.integers(round(low * LAST_TIMESTEP), round(high * LAST_TIMESTEP) + 1, size=rows)
    return torch.from_numpy(steps) / LAST_TIMESTEP
