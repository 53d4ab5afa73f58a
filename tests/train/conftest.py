"""A base model and a hypernetwork of a few thousand numbers: the trainer's own objects in milliseconds."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hyperalign.hosts.diffusers_adapter import Adapter, Call, unet_call
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.schedule import Schedule
from train.bases.base import Conditions
from train.config import TrainConfig
from train.process import Diffusion, Process
from train.setup import new_hyperalign

NETWORK = HyperNetworkConfig(rank=2, a=3, b=3, width=8, layers=1, heads=1)


class SmallBase:
    """A U-Net with two attention blocks to adapt behind the `Base` and `Texts` protocols."""

    cfg = True
    latent_shape = (4, 4, 4)
    device = torch.device("cpu")

    def __init__(self, process: Process) -> None:
        torch.manual_seed(0)
        self.backbone = UNet2DConditionModel(
            sample_size=4, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8,
            attention_head_dim=4, norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        )  # fmt: skip
        self.backbone.eval().requires_grad_(False)
        self.process = process

    def call(self, x_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Call:
        return unet_call(x_BCHW, t_B, conditions["context"])

    def prediction(self, output: Tensor, x_BCHW: Tensor) -> Tensor:
        return output.float()

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW[:, :3] / 2 + 0.5

    def encode(self, images_BCHW: Tensor) -> Tensor:
        raise NotImplementedError

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        rows = [torch.randn(2, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return {"context": torch.stack(rows)}


@pytest.fixture(scope="session")
def make_base() -> Callable[..., Any]:
    """Returns a small base model for a noise process."""
    return lambda process=None: SmallBase(process or Diffusion())


@pytest.fixture(scope="session")
def small_base(make_base: Callable[..., Any]) -> Any:
    return make_base()


@pytest.fixture(scope="session")
def adapted() -> Callable[..., Adapter]:
    """Returns a base model adapted by a hypernetwork whose weights are not at zero any more."""

    def adapter_of(base: Any, schedule: Schedule = Schedule("S"), std: float = 0.3) -> Adapter:  # noqa: B008
        torch.manual_seed(1)
        adapter = Adapter(
            base.backbone, new_hyperalign(TrainConfig(network=NETWORK), base.backbone, schedule)
        )
        for matrix in adapter.network.b_aux:
            torch.nn.init.normal_(matrix, std=std)
        return adapter

    return adapter_of


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    """Returns latents for the small base model, decided by a seed."""

    def latents(rows: int, seed: int = 0) -> Tensor:
        return torch.randn(rows, 4, 4, 4, generator=torch.Generator().manual_seed(seed))

    return latents
