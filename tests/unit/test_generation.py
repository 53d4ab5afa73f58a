"""Cores are generated where the base model runs, wherever the hypernetwork is kept."""

from __future__ import annotations

import pytest
import torch

from hyperalign.hosts.generation import Generator
from hyperalign.hosts.layers import AdaptedLayers
from hyperalign.hosts.weights import Weights
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.targets import Place, Target


@pytest.mark.parametrize("conditioning", ["none", "constant"])
def test_a_static_network_that_stayed_elsewhere_gives_cores_where_the_text_is(conditioning) -> None:
    """As a host that moves a network in parts leaves its own parameters on the processor."""
    config = HyperNetworkConfig(rank=2, a=4, b=4, width=16, layers=1, heads=2, conditioning=conditioning)
    network = HyperNetwork(config, [Target("q", 8, 8)], (3,), 5).requires_grad_(False)
    layers = AdaptedLayers(network, [Place("q")])
    generator = Generator(network, layers, Weights(layers, "additive"))
    cores_BMDA = generator.cores([], torch.zeros(2, 7, 5, device="meta"))
    assert cores_BMDA.shape == (2, 1, 4, 4)
    assert cores_BMDA.device.type == "meta"
