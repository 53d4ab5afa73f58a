"""Features are collected in the middle of a forward, one map per level."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from hyperalign.hosts.features import ImageTokens, PerceptionDone, collecting, first_output, stop_forward

X = torch.arange(2.0)[None]


class Counting(nn.Module):
    """Three blocks that each add one; it counts how many ran."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(3))
        self.ran = 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + 1
            self.ran += 1
        return x


def test_the_maps_of_all_levels_are_handed_over_once_in_order() -> None:
    model, received = Counting(), []

    def complete(features: list[Tensor]) -> None:
        received.append(([feature.clone() for feature in features], model.ran))

    with collecting(model.blocks[:2], lambda output: 10 * output, complete) as features:
        output = model(X)
    assert torch.equal(output, X + 3)
    ((maps, ran),) = received
    assert [found.tolist() for found in maps] == [(10 * X).tolist(), (10 * (X + 1)).tolist()]
    assert ran == 1  # the second block has just run, what follows it has not
    assert [feature.tolist() for feature in features] == [found.tolist() for found in maps]


def test_a_forward_can_end_after_its_perception_blocks() -> None:
    model = Counting()
    with collecting(model.blocks[:1], first_output, stop_forward) as features:
        with contextlib.suppress(PerceptionDone):
            model(X)
            pytest.fail("the forward went on")
    assert model.ran == 0 and torch.equal(features[0], X)
    assert torch.equal(model(X), X + 3)


def test_a_layer_s_output_may_come_in_a_tuple() -> None:
    assert first_output(X) is X
    assert first_output((X, 1)) is X


def test_image_tokens_become_a_map_and_tokens_beyond_the_grid_are_dropped() -> None:
    tokens = torch.arange(14.0).view(1, 7, 2)  # seven tokens of two channels
    found = ImageTokens((2, 3), index=1)(("text", tokens))
    assert found.shape == (1, 2, 2, 3)
    assert found[0, 0].tolist() == [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]
    assert found[0, 1].tolist() == [[1.0, 3.0, 5.0], [7.0, 9.0, 11.0]]
