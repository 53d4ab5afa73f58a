"""The weights of adapted layers, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hyperalign.hosts.layers import AdaptedLayers, LowRank
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.targets import Place, Target

WIDTHS = ((6, 7), (4, 7), (6, 5), (4, 4))


def network() -> HyperNetwork:
    torch.manual_seed(0)
    config = HyperNetworkConfig(rank=1, a=2, b=3, conditioning="none")
    made = HyperNetwork(config, [Target(f"t{i}", *widths) for i, widths in enumerate(WIDTHS)], [1])
    for b_aux in made.b_aux:
        nn.init.normal_(b_aux)
    return made.requires_grad_(False)


def random_cores(samples: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(samples, len(WIDTHS), 3, 2, generator=torch.Generator().manual_seed(1), dtype=dtype)


def fold(made: HyperNetwork, cores: Tensor, strength: float, dtype: torch.dtype) -> tuple[LowRank, ...]:
    layers = AdaptedLayers(made, [Place(target.name) for target in made.targets])
    return layers.fold(cores, strength, dtype)


@pytest.mark.parametrize("strength", [1.0, 0.25, -0.5, 0.0])
def test_each_target_gets_its_own_folded_matrices_in_order(strength: float) -> None:
    made, cores = network(), random_cores()
    weights = fold(made, cores, strength, torch.float32)
    assert len(weights) == len(WIDTHS)
    for index, (inside, outside) in enumerate(WIDTHS):
        a_aux, b_aux = made.aux(index)
        down, up = weights[index].down_BID, weights[index].up_DO
        assert (down.shape, up.shape) == ((2, inside, 3), (3, outside))
        for row in range(2):
            torch.testing.assert_close(down[row], (cores[row, index] @ a_aux).T)
        torch.testing.assert_close(up, strength * b_aux.T)


def test_a_strength_below_zero_turns_the_change_round() -> None:
    made, cores = network(), random_cores()
    forth, back = (fold(made, cores, strength, torch.float32) for strength in (0.7, -0.7))
    for one, other in zip(forth, back, strict=True):
        assert torch.equal(one.up_DO, -other.up_DO)
        assert torch.equal(one.down_BID, other.down_BID)


def test_weights_are_folded_in_the_precision_of_the_cores_and_cast_last() -> None:
    made, cores = network().double(), random_cores(dtype=torch.float64)
    exact, rounded = (fold(made, cores, 1 / 3, dtype) for dtype in (torch.float64, torch.bfloat16))
    for layer, cast in zip(exact, rounded, strict=True):
        for one, other in ((layer.down_BID, cast.down_BID), (layer.up_DO, cast.up_DO)):
            assert (one.dtype, other.dtype) == (torch.float64, torch.bfloat16)
            assert torch.equal(one.bfloat16(), other)


def test_a_network_of_half_precision_is_folded_in_that_of_the_cores() -> None:
    made, cores = network().half(), random_cores()
    down = fold(made, cores, 1.0, torch.float32)[0].down_BID[0]
    torch.testing.assert_close(down, (cores[0, 0] @ made.aux(0)[0].float()).T)
