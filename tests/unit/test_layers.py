"""Folded weights give the delta of the formula, leave layers as they were, and compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.adapter import Adapter, unet_call
from hyperalign.hosts.layers import AdaptedLayers
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.targets import Place, Target


class Operators(TorchDispatchMode):
    """Counts what a call dispatches, views apart: those launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.views = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.is_view or func is torch.ops.aten._unsafe_view.default:
            self.views += 1
        else:
            self.kernels += 1
        return func(*args, **(kwargs or {}))


def counted(call) -> tuple[int, int]:
    with torch.no_grad(), Operators() as operators:
        call()
    return operators.kernels, operators.views


def formula(x, a_aux, b_aux, core):
    """The change as the paper has it, factor by factor."""
    return x @ a_aux.T @ core.transpose(-1, -2) @ b_aux.T


def test_folded_weights_are_the_formula(make_hyperalign) -> None:
    network = make_hyperalign("separate").network
    cores = torch.randn(3, len(network.targets), 16, 16)
    layers = AdaptedLayers(network, [Place(target.name) for target in network.targets])
    for strength in (0.7, -0.7):
        for index, weights in enumerate(layers.fold(cores, strength, torch.float32)):
            x = torch.randn(3, 5, network.targets[index].in_features)
            expected = strength * formula(x, *network.aux(index), cores[:, index])
            torch.testing.assert_close(x @ weights.down_BID @ weights.up_DO, expected, atol=1e-4, rtol=1e-4)


def fused_layer(first: int) -> tuple[HyperNetwork, AdaptedLayers, torch.nn.Linear]:
    """Query, key and value of width 6 in one layer, `first` outputs before them and 5 behind."""
    targets = [Target(name, 8, 6) for name in ("q", "k", "v")]
    network = HyperNetwork(HyperNetworkConfig(rank=2, a=4, b=4, width=16, layers=1), targets, (3,))
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
    network = HyperNetwork(HyperNetworkConfig(rank=2, a=4, b=4, width=16, layers=1), targets, (3,))
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


def test_tiled_samples_get_the_weights_of_the_sample_they_came_from() -> None:
    _, layers, module = fused_layer(first=0)
    x, cores = torch.randn(2, 5, 8), torch.randn(2, 3, 4, 4)
    with torch.no_grad(), layers.installed([module]):
        layers.give(layers.fold(cores, 1.0, torch.float32))
        whole = module(x)
        torch.testing.assert_close(module(x.repeat_interleave(3, 0)), whole.repeat_interleave(3, 0))
        with pytest.raises(HyperAlignError, match="expected a multiple of 2"):
            module(x.repeat(2, 1, 1)[:3])


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


def test_gradients_are_those_of_the_formula(unet, make_hyperalign, inputs) -> None:
    hyperalign = make_hyperalign("separate")
    network, adapter = hyperalign.network.double(), Adapter(copy.deepcopy(unet).double(), hyperalign)
    x, t, context = inputs(2)
    call = unet_call(x.double(), t, context.double())
    cores = torch.randn(2, len(network.targets), 16, 16, dtype=torch.float64, requires_grad=True)
    parameters = [cores, *network.a_aux, *network.b_aux]

    def by_formula(index: int, module: torch.nn.Module) -> None:
        original = module.forward
        aux = network.aux(index)
        module.forward = lambda x: original(x) + 0.7 * formula(x, *aux, cores[:, index])

    found = torch.autograd.grad(
        adapter.forward(call, cores, 0.7).square().sum(), parameters, retain_graph=True
    )
    for index, target in enumerate(network.targets):
        by_formula(index, adapter.base.get_submodule(target.name))
    expected = torch.autograd.grad(adapter.base(**call)[0].square().sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_compiled_blocks_see_every_generation(unet, make_hyperalign, inputs, mode) -> None:
    compiled = copy.deepcopy(unet)
    for name, block in compiled.named_modules():
        if name.split(".")[-2:-1] == ["transformer_blocks"]:
            block.forward = torch.compile(block.forward, backend="aot_eager")
    ours, theirs = (Adapter(model, make_hyperalign(mode)) for model in (compiled, unet))
    x, t, context = inputs(2)
    with torch.no_grad():
        for latents in (x, 0.1 * x.flip(-1), x):
            call = unet_call(latents, t, context)
            torch.testing.assert_close(compiled(**call)[0], unet(**call)[0], atol=1e-4, rtol=1e-4)
            found, expected = ours.generate_and_forward(call)[0], theirs.generate_and_forward(call)[0]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert (found - compiled(**call)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_layers_are_left_as_they_were(unet, make_hyperalign, inputs, mode) -> None:
    before = {name: set(module.__dict__) for name, module in unet.named_modules()}
    with torch.no_grad():
        Adapter(unet, make_hyperalign(mode)).generate_and_forward(unet_call(*inputs()))
    assert {name: set(module.__dict__) for name, module in unet.named_modules()} == before
