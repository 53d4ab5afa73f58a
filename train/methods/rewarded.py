"""What methods log that send a reward's gradient through images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from train.methods.step import Step, StepMetrics


@dataclass(slots=True)
class RewardTally:
    """The losses and scores of a step's backward passes."""

    losses: list[Tensor] = field(default_factory=list[Tensor])
    scores: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])

    def add(self, loss: Tensor, scores: Mapping[str, Tensor], share: float) -> None:
        """Adds a backward pass: its loss, each reward's scores (B,), and its share of the batch."""
        self.losses.append(share * loss.detach())
        for name, score_B in scores.items():
            self.scores.setdefault(name, []).append(score_B)

    def metrics(self, step: Step) -> StepMetrics:
        """Returns the means over the batch, and the norm of the gradient so far."""
        found = {name: torch.cat(parts) for name, parts in self.scores.items()}
        return {
            "reward_loss": torch.stack(self.losses).sum(),
            **{name: score_B.nanmean() for name, score_B in found.items()},
            "not_finite": found["reward"].isnan().float().mean(),
            "grad_norm_reward": step.gradient().norm(),
        }
