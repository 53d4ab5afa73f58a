"""What a hypernetwork generates in either host, recorded and compared.

A plain module beside the tests: conftest.py puts this folder on the path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def recorded_cores(hyperalign) -> Iterator[list[torch.Tensor]]:
    """Gathers the generated cores, a tensor (B, M, D, A) each time weights are generated."""
    written: list[torch.Tensor] = []
    network: nn.Module = hyperalign.hyperalign.network
    handle = network.register_forward_hook(lambda _m, _i, cores: written.append(cores.clone()))
    try:
        yield written
    finally:
        handle.remove()


def assert_same_cores(in_comfyui: list[torch.Tensor], in_diffusers: list[torch.Tensor], count: int) -> None:
    """Compares the cores of a run, row by row, to 1e-5 of their size, which is about 2.

    What tells steps and prompts apart is about as large as what is the same for all.
    """
    assert len(in_comfyui) == len(in_diffusers) == count
    for ours, theirs in zip(in_comfyui, in_diffusers, strict=True):
        size = theirs.square().mean().sqrt()
        relative = float((ours - theirs).square().mean().sqrt() / size)
        assert relative < 1e-5, f"{relative:.1e} of {size:.2f}"
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
