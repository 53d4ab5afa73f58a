"""What a hypernetwork generates in either host, recorded and compared.

A plain module beside the tests: conftest.py puts this folder on the path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def recorded_cores(hyperalign) -> Iterator[list[torch.Tensor]]:
    """Gathers the generated cores, a tensor (B, M, D, A) each time weights are generated."""
    from hyperalign.hosts.generation import Generator

    written: list[torch.Tensor] = []
    original, network = Generator.cores, hyperalign.hyperalign.network

    def cores(generator, *inputs):
        made = original(generator, *inputs)
        if generator._network is network:
            written.append(made.clone())
        return made

    with mock.patch.object(Generator, "cores", cores):
        yield written


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
