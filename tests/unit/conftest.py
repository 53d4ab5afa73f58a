"""Small models with random weights, and a hypernetwork that changes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel

from hyperalign.checkpoint import Header, HyperAlign
from hyperalign.families.unet import TINY
from hyperalign.hypernetwork import Conditioning, HyperNetwork, HyperNetworkConfig
from hyperalign.schedule import Schedule
from hyperalign.targets import PerceptionMode
from hyperalign.tiny.weights import UNET_CONFIG


@pytest.fixture(scope="session")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET_CONFIG).eval().requires_grad_(False)


def _hyperalign(
    mode: PerceptionMode = "prefix",
    schedule: Schedule | None = None,
    conditioning: Conditioning = "full",
    trained: bool = True,
) -> HyperAlign:
    """Returns a random hypernetwork; `trained` gives B_aux values, so that it changes the model."""
    torch.manual_seed(1)
    config = HyperNetworkConfig(conditioning=conditioning)
    targets = TINY.targets(mode)
    network = HyperNetwork(config, targets, TINY.feature_channels)
    if trained:
        for b_aux in network.b_aux:
            torch.nn.init.normal_(b_aux, std=0.1)
    header = Header(
        TINY.fingerprint(),
        mode,
        TINY.feature_channels,
        targets,
        config,
        schedule or Schedule("S"),
        {"note": "random"},
    )
    return HyperAlign(network, header)


def _inputs(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns noisy latents, timesteps and context of as many different rows."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 4, 16, 16, generator=generator)
    t = torch.tensor([700, 700, 30, 999][:rows])
    return x, t, torch.randn(rows, 16, 128, generator=generator)


@pytest.fixture(scope="session")
def make_hyperalign() -> Callable[..., HyperAlign]:
    """Builds a random hypernetwork: mode, schedule, conditioning, trained."""
    return _hyperalign


@pytest.fixture(scope="session")
def inputs() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Builds rows of latents, timesteps and context."""
    return _inputs
