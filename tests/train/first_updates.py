"""What the tests of training methods share: a step's first update and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from train.processes import gradient_of
from train.trainer import Trainer


def first_update(run: Trainer) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the metrics and the gradient of a step's first update."""
    metrics = next(run._updates())
    return metrics, gradient_of(run.network.parameters())


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 0
    assert (found - expected).norm() <= 2e-3 * expected.norm(), (found - expected).norm() / expected.norm()


def moved(run: Trainer, std: float = 0.001) -> Trainer:
    """Moves the hypernetwork away from its start, where it changes nothing."""
    torch.manual_seed(5)
    with torch.no_grad():
        for matrix in run.network.b_aux:
            matrix.normal_(std=std)
    return run


def gradient(loss: Tensor, run: Trainer) -> Tensor:
    parameters = list(run.network.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
