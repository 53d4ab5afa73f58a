"""Adapted layers in a whole model: they give the delta of the formula, leave no trace, and compile."""

from __future__ import annotations

import copy

import pytest
import torch

from hyperalign.hosts.diffusers.adapter import Adapter, unet_call
from hyperalign.hosts.layers import AdaptedLayers
from hyperalign.targets import Place


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
            torch.testing.assert_close(x @ weights.down_BID @ weights.up_BDO, expected, atol=1e-4, rtol=1e-4)


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
