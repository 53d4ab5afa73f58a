"""diffusers' compile_repeated_blocks: aligned pipelines break no graph and compile once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import hyperalign
from hyperalign.hosts.diffusers.session import denoiser_of
from hyperalign.schedule import Schedule


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def breaks() -> int:
    return sum(counters["graph_break"].values())


def compile_blocks(model: Any) -> None:
    if model._repeated_blocks:
        model.compile_repeated_blocks(backend="eager")
    else:  # of SD 3.5 diffusers does not say which blocks repeat
        for block in model.transformer_blocks:
            block.compile(backend="eager")


@pytest.mark.parametrize("variant", ["S", "P", "I"])
def test_compiled_blocks_stay_compiled(
    pipe: Any, make_for: Any, draw: Callable[..., torch.Tensor], variant: str
) -> None:
    made = make_for(pipe, schedule=Schedule("P", (0.6,)))
    base = draw(pipe)
    with hyperalign.attach(pipe, made, variant=variant):
        expected = draw(pipe)
    compile_blocks(denoiser_of(pipe))
    torch.testing.assert_close(draw(pipe), base, atol=1e-4, rtol=1e-4)
    alone = graphs()
    torch._dynamo.reset()
    counters.clear()
    with hyperalign.attach(pipe, made, variant=variant):
        torch.testing.assert_close(draw(pipe), expected, atol=1e-4, rtol=1e-4)
        assert graphs() == alone
        draw(pipe)
        assert graphs() == alone
    assert breaks() == 0
    assert (expected - base).abs().max() > 1e-3
