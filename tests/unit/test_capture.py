"""Captured generations: only on a GPU, only where that is safe, and with the same weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperalign.hosts import capture
from hyperalign.hosts.capture import Captured, can_capture

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def doubled(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [2 * tensor for tensor in inputs]


def test_on_a_processor_a_function_runs_as_it_is() -> None:
    captured = Captured()
    for value in range(3):
        (found,), overwritten = captured.run("key", doubled, [torch.tensor([float(value)])])
        assert not overwritten and found.item() == 2.0 * value


def test_a_capture_that_fails_is_told_once_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tries: list[int] = []

    def refused(*_: Any) -> None:
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(capture, "can_capture", lambda _: True)
    monkeypatch.setattr(capture, "_captured", refused)
    captured = Captured()
    for value in range(4):
        (found,), _ = captured.run("key", doubled, [torch.tensor([float(value)])])
        assert found.item() == 2.0 * value
    assert len(tries) == 1
    assert [record.message for record in caplog.records] == [
        "HyperAlign generates weights without a CUDA graph, because capturing failed: operation not "
        "permitted when stream is capturing"
    ]


@GPU
def test_a_replay_computes_what_the_function_does_and_overwrites_its_outputs() -> None:
    captured = Captured()
    with torch.no_grad():
        for value in range(5):
            (found,), overwritten = captured.run(
                "key", doubled, [torch.full((3,), float(value), device="cuda")]
            )
            assert overwritten == (value > 0)
            assert found.tolist() == [2.0 * value] * 3


@GPU
def test_what_reads_a_value_cannot_be_captured_and_runs_as_it_is() -> None:
    captured = Captured()

    def reads(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [inputs[0] * float(inputs[0].sum())]

    with torch.no_grad():
        for _ in range(3):
            (found,), overwritten = captured.run("key", reads, [torch.ones(2, device="cuda")])
            assert not overwritten and found.tolist() == [2.0, 2.0]
        assert torch.ones(4, device="cuda").sum().item() == 4.0


@GPU
@torch.no_grad()
def test_other_shapes_have_graphs_of_their_own_up_to_a_limit() -> None:
    captured = Captured()
    for _ in range(2):
        for size in range(1, capture.MAX_GRAPHS + 3):
            (found,), _ = captured.run(size, doubled, [torch.ones(size, device="cuda")])
            assert found.tolist() == [2.0] * size
    assert len(captured._graphs) == capture.MAX_GRAPHS


@GPU
def test_nothing_is_captured_where_a_gradient_is_taken() -> None:
    x = [torch.ones(2, device="cuda")]
    assert not can_capture(x)
    with torch.no_grad():
        assert can_capture(x)
    with torch.inference_mode():
        assert can_capture(x)
