"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, eq 14).

L = -log sigmoid(-beta / 2 ((e_w - e_w,ref) - (e_l - e_l,ref))), with e the mean squared error of the
model's output on the preferred (w) and the rejected (l) image of a pair, both with the same noise at the
same timestep. The reference is the base model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from train.methods.pairs import image_errors, reference_errors, states_of
from train.methods.step import Step, StepMetrics


def dpo(step: Step) -> Iterator[StepMetrics]:
    """Adds the gradient of the loss on a batch of pairs."""
    o = step.objective
    pairs = step.pairs(o.preference_batch, o.preference_range, purpose=5, dropout=step.caption_dropout)
    losses, margins = list[Tensor](), list[Tensor]()
    for part, share in step.micro_batches(len(pairs)):
        images = pairs[part].both()
        states = states_of(step, images)
        with step.autocast():
            own, reference = image_errors(step, images, states), reference_errors(step, images, states)
        margin_B = margins_of(own, reference)
        loss = dpo_loss(margin_B, step.config.dpo.beta)
        step.backward(o.preference_weight * share * loss)
        losses.append(share * loss.detach())
        margins.append(margin_B.detach())
    correct = (torch.cat(margins) < 0).float().mean()
    yield {"preference_loss": torch.stack(losses).sum(), "pairs_right": correct}


def margins_of(own_2B: Tensor, reference_2B: Tensor) -> Tensor:
    """Returns (e_w - e_w,ref) - (e_l - e_l,ref) of each pair (B,); preferred images come first."""
    preferred, rejected = (own_2B - reference_2B).chunk(2)
    return preferred - rejected


def dpo_loss(margin_B: Tensor, beta: float) -> Tensor:
    """Returns the mean of -log sigmoid(-beta / 2 margin); log 2 where the model is the base model."""
    return -F.logsigmoid(-0.5 * beta * margin_B).mean()
