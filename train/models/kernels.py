"""Which kernels compute attention on a GPU, in forward and backward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.config import AttentionKernel

BACKENDS: dict[AttentionKernel, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_kernels(
    kernels: Sequence[AttentionKernel], device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """Lets attention on a GPU run with these kernels alone: the first one that takes its shapes.

    PyTorch's own choice may be cuDNN, whose backward pass ends FLUX.1's training on an H100 with an illegal
    memory access (24 heads of 128, 4608 tokens). Elsewhere than on a GPU PyTorch chooses.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([BACKENDS[kernel] for kernel in kernels], set_priority=True)
