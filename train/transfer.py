"""Tensors on their way to a GPU, which goes on computing meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the CPU on the device; neither waits for the other.

    An ordinary copy to a GPU first waits for all that the GPU has been given to do.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
