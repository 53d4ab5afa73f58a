"""Pairs of a preferred and a rejected image of one prompt, and the errors that methods compare on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train.models.base import with_guidance
from train.objective import NoisedImages, States, denoising_errors, noised_states

if TYPE_CHECKING:
    from train.methods.step import Step


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of one prompt each; both images get the same noise at the same timestep."""

    preferred: NoisedImages
    rejected: Tensor

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.rejected)

    def __getitem__(self, part: slice) -> Pairs:
        """Returns some of the pairs."""
        return Pairs(self.preferred[part], self.rejected[part])

    def both(self) -> NoisedImages:
        """Returns the preferred images, and then the rejected ones."""
        one = self.preferred
        return NoisedImages(
            torch.cat([one.x0, self.rejected]), torch.cat([one.eps, one.eps]),
            torch.cat([one.eps_gen, one.eps_gen]), torch.cat([one.t_B, one.t_B]), one.captions * 2,
        )  # fmt: skip

    def chosen(self, preferred_B: Tensor) -> NoisedImages:
        """Returns one image of each pair: the preferred one where `preferred_B` (B,) is true."""
        one = self.preferred
        x0 = torch.where(preferred_B.view(-1, *[1] * (one.x0.ndim - 1)), one.x0, self.rejected)
        return NoisedImages(x0, one.eps, one.eps_gen, one.t_B, one.captions)


def states_of(step: Step, images: NoisedImages) -> States:
    """Returns images, noised, with what their weights are generated from."""
    encode, guidance = step.inputs.encoder.conditions, step.objective.preference_guidance
    cond = with_guidance(step.base, encode(images.captions), guidance)
    return noised_states(step.base, step.schedule, images, cond, None)


def image_errors(step: Step, images: NoisedImages, states: States) -> Tensor:
    """Returns each image's mean squared error (B,) by the adapted model, with its gradient."""
    return denoising_errors(step.adapter, step.base, images.x0, images.eps, states)


@torch.no_grad()
def reference_errors(step: Step, images: NoisedImages, states: States) -> Tensor:
    """Returns each image's mean squared error (B,) by the base model."""
    return denoising_errors(None, step.base, images.x0, images.eps, states)
