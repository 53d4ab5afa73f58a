"""Adapted layers one by one: their weights worked out by hand, and what their forwards do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.launches import Operators
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.layers import AdaptedLayers, LayerWeights, LowRank
from hyperalign.hosts.merging import MergedWeights
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.targets import Place, Target

WIDTHS = ((6, 7), (4, 7), (6, 5), (4, 4))


def network() -> HyperNetwork:
    torch.manual_seed(0)
    config = HyperNetworkConfig(rank=1, a=2, b=3, conditioning="none")
    made = HyperNetwork(config, [Target(f"t{i}", *widths) for i, widths in enumerate(WIDTHS)], [1], 2)
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
        down, up = weights[index].down_BID, weights[index].up_BDO
        assert (down.shape, up.shape) == ((2, inside, 3), (2, 3, outside))
        for row in range(2):
            torch.testing.assert_close(down[row], (cores[row, index] @ a_aux).T)
            torch.testing.assert_close(up[row], strength * b_aux.T)
        assert up[0].data_ptr() == up[1].data_ptr()


def test_a_strength_below_zero_turns_the_change_round() -> None:
    made, cores = network(), random_cores()
    forth, back = (fold(made, cores, strength, torch.float32) for strength in (0.7, -0.7))
    for one, other in zip(forth, back, strict=True):
        assert torch.equal(one.up_BDO, -other.up_BDO)
        assert torch.equal(one.down_BID, other.down_BID)


def test_weights_are_folded_in_the_precision_of_the_cores_and_cast_last() -> None:
    made, cores = network().double(), random_cores(dtype=torch.float64)
    exact, rounded = (fold(made, cores, 1 / 3, dtype) for dtype in (torch.float64, torch.bfloat16))
    for layer, cast in zip(exact, rounded, strict=True):
        for one, other in ((layer.down_BID, cast.down_BID), (layer.up_BDO, cast.up_BDO)):
            assert (one.dtype, other.dtype) == (torch.float64, torch.bfloat16)
            assert torch.equal(one.bfloat16(), other)


def test_a_network_of_half_precision_is_folded_in_that_of_the_cores() -> None:
    made, cores = network().half(), random_cores()
    down = fold(made, cores, 1.0, torch.float32)[0].down_BID[0]
    torch.testing.assert_close(down, (cores[0, 0] @ made.aux(0)[0].float()).T)


# One layer


def counted(call) -> tuple[int, int]:
    """Operators and views."""
    with torch.no_grad(), Operators() as operators:
        call()
    return operators.names.total(), operators.views


def formula(x, a_aux, b_aux, core):
    """The change as the paper has it, factor by factor."""
    return x @ a_aux.T @ core.transpose(-1, -2) @ b_aux.T


def fused_layer(first: int) -> tuple[HyperNetwork, AdaptedLayers, torch.nn.Linear]:
    """Query, key and value of width 6 in one layer, `first` outputs before them and 5 behind."""
    targets = [Target(name, 8, 6) for name in ("q", "k", "v")]
    network = HyperNetwork(HyperNetworkConfig(rank=2, a=4, b=4, width=16, layers=1), targets, (3,), 2)
    for b_aux in network.b_aux:
        torch.nn.init.normal_(b_aux)
    places = [Place("qkv", first + 6 * index) for index in range(3)]
    return network, AdaptedLayers(network, places), torch.nn.Linear(8, first + 18 + 5)


@pytest.mark.parametrize("first", [0, 7])
def test_fused_projections_each_get_their_own_rows(first: int) -> None:
    network, layers, module = fused_layer(first)
    x, cores = torch.randn(2, 5, 8), torch.randn(2, 3, 4, 4)
    with torch.no_grad(), layers.installed([module]):
        layers.give(layers.fold(cores, 0.5, torch.float32))
        found = module(x)
    expected = module(x).detach()
    for index in range(3):
        rows = slice(first + 6 * index, first + 6 * (index + 1))
        expected[..., rows] += 0.5 * formula(x, *network.aux(index), cores[:, index]).detach()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert layers.targets_reached == 3


def test_an_adapted_layer_is_two_operators_more_than_the_plain_one() -> None:
    targets = [Target("q", 8, 6)]
    network = HyperNetwork(HyperNetworkConfig(rank=2, a=4, b=4, width=16, layers=1), targets, (3,), 2)
    layers, module = AdaptedLayers(network, [Place("q")]), torch.nn.Linear(8, 6)
    x = torch.randn(2, 5, 8)
    plain = counted(lambda: module(x))
    with layers.installed([module]):
        layers.give(layers.fold(torch.randn(2, 1, 4, 4), 1.0, torch.float32))
        adapted = counted(lambda: module(x))
    assert sum(adapted) - sum(plain) <= 3  # with one view, the expansion of `up` over the samples
    assert adapted[0] - plain[0] == 2


def test_three_fused_projections_are_two_operators_more_too() -> None:
    _, layers, module = fused_layer(first=7)
    x = torch.randn(2, 5, 8)
    plain = counted(lambda: module(x))
    with layers.installed([module]):
        layers.give(layers.fold(torch.randn(2, 3, 4, 4), 1.0, torch.float32))
        adapted = counted(lambda: module(x))
    assert adapted[0] - plain[0] == 2


def test_a_layer_that_runs_before_its_weights_is_refused() -> None:
    _, layers, module = fused_layer(first=0)
    with layers.installed([module]), pytest.raises(HyperAlignError, match="before its weights"):
        module(torch.randn(2, 5, 8))
    assert layers.targets_reached == 3


def in_both_ways(layers: AdaptedLayers, module: nn.Linear, cores: Tensor) -> list[LayerWeights]:
    """The weights to add, and those that are merged."""
    merged = MergedWeights(layers.folding, [module], len(cores))
    merged.write(layers.folding.fold(cores, 1.0, torch.float32))
    return [layers.fold(cores, 1.0, torch.float32), merged.weights]


@pytest.mark.parametrize("order", [[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0], [1]], ids=str)
def test_copies_of_a_sample_get_its_weights_in_any_order(order: list[int]) -> None:
    _, layers, module = fused_layer(first=0)
    x, cores = torch.randn(2, 5, 8), torch.randn(2, 3, 4, 4)
    with torch.no_grad(), layers.installed([module]):
        for weights in in_both_ways(layers, module, cores):
            layers.give(weights)
            layers.rows.compare(x[order], x)
            torch.testing.assert_close(module(x[order]), module(x)[order])


@pytest.mark.parametrize("alike", [False, True])
def test_tiles_of_a_sample_get_its_weights(alike: bool) -> None:
    """Samples of the same content, too, as both prompts' are before the first text attention."""
    _, layers, module = fused_layer(first=0)
    x, cores = torch.randn(2, 6, 8), torch.randn(2, 3, 4, 4)
    x = x[:1].expand(2, -1, -1) if alike else x
    tiles = x.unflatten(1, (3, 2)).flatten(0, 1)
    with torch.no_grad(), layers.installed([module]):
        for weights in in_both_ways(layers, module, cores):
            layers.give(weights)
            layers.rows.compare(tiles, x)
            torch.testing.assert_close(module(tiles).unflatten(0, (2, 3)).flatten(1, 2), module(x))


def test_tiles_that_may_be_either_sample_s_are_refused() -> None:
    _, layers, module = fused_layer(first=0)
    x = torch.randn(1, 6, 8).expand(2, -1, -1)
    tiles = x.unflatten(1, (3, 2)).transpose(0, 1).flatten(0, 1)
    with torch.no_grad(), layers.installed([module]):
        layers.give(layers.fold(torch.randn(2, 3, 4, 4), 1.0, torch.float32))
        layers.rows.compare(tiles, x)
        with pytest.raises(HyperAlignError, match="6 rows for 2 samples"):
            module(tiles)


def test_rows_that_are_no_sample_s_are_refused_unless_all_weights_are_the_same() -> None:
    _, layers, module = fused_layer(first=0)
    x, cores = torch.randn(2, 5, 8), torch.randn(2, 3, 4, 4)
    with torch.no_grad(), layers.installed([module]):
        layers.give(layers.fold(cores, 1.0, torch.float32))
        layers.rows.compare(torch.randn(4, 5, 8), x)
        with pytest.raises(HyperAlignError, match="4 rows for 2 samples"):
            module(x.repeat(2, 1, 1))
        layers.rows.forget()
        with pytest.raises(HyperAlignError, match="4 rows for 2 samples"):
            module(x.repeat(2, 1, 1))
        layers.give(layers.fold(cores[:1].expand(2, -1, -1, -1), 1.0, torch.float32))
        whole = module(x)
        torch.testing.assert_close(module(x.repeat(2, 1, 1)), whole.repeat(2, 1, 1))


def test_another_forward_is_kept_below_ours_and_put_back() -> None:
    _, layers, module = fused_layer(first=0)
    plain = module.forward

    def theirs(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return plain(x) * scale

    module.forward = theirs
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), layers.installed([module]):
        layers.give(layers.fold(torch.zeros(2, 3, 4, 4), 1.0, torch.float32))
        torch.testing.assert_close(module(x, scale=2.0), 2.0 * plain(x))
    assert module.__dict__["forward"] is theirs
    assert "hyperalign" not in module.__dict__


def test_reset_forgets_which_layers_ran() -> None:
    _, layers, module = fused_layer(first=0)
    with torch.no_grad(), layers.installed([module]):
        layers.give(layers.fold(torch.zeros(2, 3, 4, 4), 1.0, torch.float32))
        module(torch.randn(2, 5, 8))
    assert layers.targets_reached == 3
    layers.reset()
    assert layers.targets_reached == 0


def test_fused_projections_may_come_in_any_order_and_width() -> None:
    """Value of 5 outputs at row 9, query of 6 at row 3; the layer has 2 inputs and 16 outputs."""
    targets = [Target("v", 2, 5), Target("q", 2, 6)]
    made = HyperNetwork(HyperNetworkConfig(rank=1, a=2, b=3, conditioning="none"), targets, [1], 2)
    for b_aux in made.b_aux:
        nn.init.normal_(b_aux)
    layers, module = AdaptedLayers(made, [Place("qv", 9), Place("qv", 3)]), nn.Linear(2, 16)
    x, cores = torch.randn(2, 4, 2), torch.randn(2, 2, 3, 2)
    expected = module(x)
    expected[..., 9:14] += formula(x, *made.aux(0), cores[:, 0])
    expected[..., 3:9] += formula(x, *made.aux(1), cores[:, 1])
    with torch.no_grad(), layers.installed([module]):
        (weights,) = layers.fold(cores, 1.0, torch.float32)
        assert weights.down_BID.shape == (2, 2, 6) and weights.up_BDO.shape == (2, 6, 11)
        layers.give([weights])
        torch.testing.assert_close(module(x), expected.detach())
    assert layers.paths == ["qv"]


# Several layers


def several(constant: bool = False) -> tuple[AdaptedLayers, list[nn.Linear], tuple[LowRank, ...]]:
    """The layers of `WIDTHS` and, if asked for, two that are not adapted, with weights for two samples."""
    made = network()
    further = {"plain": (6, 4), "other": (3, 5)} if constant else None
    layers = AdaptedLayers(made, [Place(target.name) for target in made.targets], further)
    modules = [nn.Linear(*widths) for widths in (*WIDTHS, *(further or {}).values())]
    return layers, modules, layers.fold(random_cores(), 1.0, torch.float32)


def changed(modules: list[nn.Linear]) -> list[bool | None]:
    """Whether each layer's output is another than its class's; None for one that refuses to run."""
    found: list[bool | None] = []
    for module in modules:
        x = torch.ones(2, 1, module.in_features)
        try:
            found.append(not torch.equal(module(x), nn.Linear.forward(module, x)))
        except HyperAlignError:
            found.append(None)
    return found


@torch.no_grad()
def test_layers_can_be_adapted_and_given_weights_apart_from_the_others() -> None:
    layers, modules, weights = several()
    with layers.installed(modules, inside=[1, 3]):
        layers.give(weights, inside=[1])
        assert changed(modules) == [False, True, False, None]
        layers.give(weights, inside=range(4))
        assert changed(modules) == [False, True, False, True]
        assert layers.targets_reached == 2
    assert changed(modules) == [False] * 4
    with layers.installed(modules):  # what was inside has lost its weights, the others have kept theirs
        assert changed(modules) == [True, None, True, None]
        layers.give(weights)
        assert changed(modules) == [True] * 4
        layers.reset()
        assert layers.targets_reached == 0
        assert changed(modules) == [None] * 4


@torch.no_grad()
def test_layers_are_left_as_they_were_even_if_one_cannot_be_adapted() -> None:
    layers, modules, _ = several()
    before = [dict(module.__dict__) for module in modules]
    with pytest.raises(AttributeError), layers.installed([*modules[:3], None]):  # type: ignore[list-item]
        pass
    assert [module.__dict__ for module in modules] == before
    with pytest.raises(KeyError), layers.installed(modules):
        raise KeyError
    assert [module.__dict__ for module in modules] == before
    assert all(adaptation.original is None for adaptation in layers._adaptations)


@torch.no_grad()
def test_constant_layers_get_zeros_with_the_strides_of_folded_weights() -> None:
    layers, modules, weights = several(constant=True)
    assert layers.paths == ["t0", "t1", "t2", "t3", "plain", "other"]
    assert len(weights) == 6
    for zeros, (inside, outside) in zip(weights[4:], ((6, 4), (3, 5)), strict=True):
        assert (zeros.down_BID.shape, zeros.up_BDO.shape) == ((2, inside, 3), (2, 3, outside))
        assert zeros.down_BID.stride()[1:] == (1, inside) and zeros.up_BDO.stride() == (0, 1, 3)
        assert not zeros.down_BID.any() and not zeros.up_BDO.any()
    assert weights[0].down_BID.stride()[1:] == (1, 6) and weights[0].up_BDO.stride()[:2] == (0, 1)
    with layers.installed(modules):
        layers.give_constant(2, torch.float32, torch.device("cpu"))
        assert changed(modules) == [None, None, None, None, False, False]
        layers.give(weights)
        assert changed(modules) == [True, True, True, True, False, False]
        assert layers.targets_reached == 4


def test_zeros_are_made_anew_only_for_other_samples_or_another_precision() -> None:
    layers, _, weights = several(constant=True)
    assert layers.fold(random_cores(), 0.5, torch.float32)[5] is weights[5]
    more = layers.fold(random_cores(3), 1.0, torch.float32)[5]
    assert more.down_BID.shape == (3, 3, 3)
    half = layers.fold(random_cores(3), 1.0, torch.bfloat16)[5]
    assert half.down_BID.dtype == half.up_BDO.dtype == torch.bfloat16
