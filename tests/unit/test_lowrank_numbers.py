"""Folded weights by hand, and layers that take them and give them back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hyperalign.hosts.lowrank import LowRank, fold, give, install, remove
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.targets import Target

WIDTHS = ((6, 7), (4, 7), (6, 5), (4, 4))


def network() -> HyperNetwork:
    torch.manual_seed(0)
    config = HyperNetworkConfig(rank=1, a=2, b=3, conditioning="none")
    made = HyperNetwork(config, [Target(f"t{i}", *widths) for i, widths in enumerate(WIDTHS)], [1])
    for b_aux in made.b_aux:
        nn.init.normal_(b_aux)
    return made.requires_grad_(False)


def random_cores(rows: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, len(WIDTHS), 3, 2, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("strength", [1.0, 0.25, -0.5, 0.0])
def test_each_target_gets_its_own_folded_matrices_in_order(strength: float) -> None:
    made, cores = network(), random_cores()
    weights = fold(made, cores, strength, torch.float32)
    assert len(weights.down) == len(weights.up) == len(WIDTHS)
    for index, (inside, outside) in enumerate(WIDTHS):
        a_aux, b_aux = made.aux(index)
        down, up = weights.down[index], weights.up[index]
        assert (down.shape, up.shape) == ((2, inside, 3), (3, outside))
        for row in range(2):
            torch.testing.assert_close(down[row], (cores[row, index] @ a_aux).T)
        torch.testing.assert_close(up, strength * b_aux.T)


def test_a_strength_below_zero_turns_the_change_round() -> None:
    made, cores = network(), random_cores()
    forth, back = (fold(made, cores, strength, torch.float32) for strength in (0.7, -0.7))
    for one, other in zip(forth.up, back.up, strict=True):
        assert torch.equal(one, -other)
    for one, other in zip(forth.down, back.down, strict=True):
        assert torch.equal(one, other)


def test_weights_are_folded_in_the_precision_of_the_cores_and_cast_last() -> None:
    made, cores = network().double(), random_cores(dtype=torch.float64)
    exact, rounded = (fold(made, cores, 1 / 3, dtype) for dtype in (torch.float64, torch.bfloat16))
    for name in ("down", "up"):
        for one, other in zip(getattr(exact, name), getattr(rounded, name), strict=True):
            assert (one.dtype, other.dtype) == (torch.float64, torch.bfloat16)
            assert torch.equal(one.bfloat16(), other)


def test_a_network_of_half_precision_is_folded_in_that_of_the_cores() -> None:
    made, cores = network().half(), random_cores()
    down = fold(made, cores, 1.0, torch.float32).down[0][0]
    torch.testing.assert_close(down, (cores[0, 0] @ made.aux(0)[0].float()).T)


class Other(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize("kind", [nn.Linear, Other])
def test_a_layer_adds_what_it_was_given_and_is_left_as_it_was(kind: type[nn.Linear]) -> None:
    layer = kind(3, 2).requires_grad_(False)
    x = torch.randn(2, 4, 3)
    before, kept = layer(x), dict(layer.__dict__)
    original = install(layer)
    assert torch.equal(layer(x), before)  # nothing given yet
    down, up = torch.randn(2, 3, 5), torch.randn(5, 2)
    give(layer, LowRank((torch.zeros(1), down), (torch.zeros(1), up)), 1)
    torch.testing.assert_close(layer(x), before + torch.stack([x[i] @ down[i] @ up for i in range(2)]))
    remove(layer, original)
    assert torch.equal(layer(x), before)
    assert layer.__dict__ == kept


def test_a_patch_that_was_there_before_goes_on_and_comes_back() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    plain = layer.forward
    seen = []

    def patched(x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        seen.append((scale, shift))
        return scale * plain(x) + shift

    layer.forward = patched
    x = torch.randn(1, 4, 3)
    before = layer(x, 2.0, shift=3.0)
    original = install(layer)
    assert original is patched
    down, up = torch.randn(1, 3, 5), torch.randn(5, 2)
    give(layer, LowRank((down,), (up,)), 0)
    torch.testing.assert_close(layer(x, 2.0, shift=3.0), before + x @ down[0] @ up)
    assert seen == [(2.0, 3.0)] * 2
    remove(layer, original)
    assert layer.__dict__["forward"] is patched
    assert not [name for name in layer.__dict__ if name.startswith("hyperalign")]


def test_a_forward_that_another_put_in_place_since_stays() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    original = install(layer)
    layer.forward = later = lambda x: x
    remove(layer, original)
    assert layer.__dict__["forward"] is later
