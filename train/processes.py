"""What the processes of a run exchange in a step: metrics, failures and gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hyperalign.errors import HyperAlignError


def mean_metrics(metrics: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Returns the metrics (scalars on the device) averaged over processes, without waiting for the device."""
    if accelerator.num_processes == 1:
        return dict(metrics)
    means = _mean(torch.stack(list(metrics.values())), accelerator)
    return dict(zip(metrics, means.unbind(), strict=True))


def mean_number(value: float, accelerator: Accelerator) -> float:
    """Returns a number's mean over processes."""
    if accelerator.num_processes == 1:
        return value
    return float(_mean(torch.tensor(value, device=accelerator.device), accelerator))


def mean_tensor(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Returns the mean over processes of a tensor on any device, on the CPU."""
    if accelerator.num_processes == 1:
        return values
    return _mean(values.to(accelerator.device), accelerator).cpu()


def any_process(holds: bool, accelerator: Accelerator) -> bool:
    """Returns whether something holds in at least one process."""
    return mean_number(float(holds), accelerator) > 0


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Averages gradients over processes in one flat reduction; a missing gradient is zero.

    The two losses are several backward passes; a DistributedDataParallel wrapper would reduce in each of them
    and fail at parameters that one pass does not use.
    """
    grads: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    if accelerator.num_processes > 1:
        means = _mean(torch.cat([grad.flatten() for grad in grads]), accelerator)
        for grad, mean in zip(grads, means.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


def gradient_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns this process's gradient so far as one vector, zero where a parameter has none yet."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in parameters]
    return torch.cat([grad.flatten() for grad in grads])


def _mean(values: Tensor, accelerator: Accelerator) -> Tensor:
    reduced = accelerator.reduce(values, reduction="mean")
    if not isinstance(reduced, Tensor):
        raise HyperAlignError(f"Accelerate returned a {type(reduced).__name__} for a reduced tensor.")
    return reduced
