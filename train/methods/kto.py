"""Diffusion-KTO (Li et al. 2024, arXiv 2404.04465): single images, each desirable or not.

With g = e_ref - e, the base model's mean squared error less the model's, and z0 = max(0, mean of g) as the
reference point, the loss is the mean of w (1 - sigmoid(y beta (g - z0))), y = 1 for a desirable image and
-1 for another. z0 is over the whole batch and has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from train.methods.pairs import image_errors, reference_errors, states_of
from train.methods.settings import KtoConfig
from train.methods.step import Step, StepMetrics
from train.processes import mean_tensor


def kto(step: Step) -> Iterator[StepMetrics]:
    """Adds the gradient of the loss on a batch of images from either side of their pairs."""
    o, config = step.objective, step.config.kto
    pairs = step.pairs(o.preference_batch, o.preference_range, purpose=6, dropout=step.caption_dropout)
    desirable_B = step.chances(len(pairs), step.randomness.generator(7)) < config.desirable_share
    images = pairs.chosen(desirable_B)
    references, gains = list[Tensor](), list[Tensor]()
    for part, _ in step.micro_batches(len(pairs)):
        states = states_of(step, images[part])
        with torch.no_grad(), step.autocast():
            references.append(reference_errors(step, images[part], states))
            gains.append(references[-1] - image_errors(step, images[part], states))
    point = mean_tensor(torch.cat(gains).mean(), step.accelerator).to(step.device).clamp(min=0.0)
    losses = list[Tensor]()
    for (part, share), reference_B in zip(step.micro_batches(len(pairs)), references, strict=True):
        with step.autocast():
            own_B = image_errors(step, images[part], states_of(step, images[part]))
        loss = kto_loss(reference_B - own_B, desirable_B[part], point, config)
        step.backward(o.preference_weight * share * loss)
        losses.append(share * loss.detach())
    yield {"preference_loss": torch.stack(losses).sum(), "reference_point": point}


def kto_loss(gain_B: Tensor, desirable_B: Tensor, point: Tensor, config: KtoConfig) -> Tensor:
    """Returns the mean of w (1 - sigmoid(y beta (g - z0))); a half where the model is the base model."""
    sign_B = torch.where(desirable_B, 1.0, -1.0).to(gain_B)
    weight_B = torch.where(desirable_B, config.desirable_weight, config.undesirable_weight).to(gain_B)
    return (weight_B * (1.0 - torch.sigmoid(sign_B * config.beta * (gain_B - point)))).mean()
