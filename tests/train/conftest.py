"""A base model and a hypernetwork of a few thousand numbers: the trainer's own objects in milliseconds."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor

from hyperalign.checkpoint import Header, HyperAlign
from hyperalign.hosts.diffusers.adapter import Adapter, Call, unet_call
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.schedule import Schedule
from train.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)
from train.data.streams import PromptList
from train.inputs import RunInputs
from train.methods.settings import AlignPropConfig, GrpoConfig, KtoConfig, SpoConfig
from train.models.base import Conditions
from train.noise import DiffusionSchedule, NoiseSchedule
from train.objective import Rewards
from train.start import new_hyperalign
from train.trainer import Trainer

sys.path.append(str(Path(__file__).parent))  # smoke_recipes.py

NETWORK = HyperNetworkConfig(rank=2, a=3, b=3, width=8, layers=1, heads=1)
OBJECTIVE = {
    "prompt_batch": 2, "rollout_steps": 4, "timesteps": 2, "preference_batch": 3, "reward_weight": 0.5,
    "preference_weight": 3.0, "guidance_scale": 2.0, "rewards": {"tiny reward": 2.0},
}  # fmt: skip
OPTIM = {"steps": 1, "warmup_steps": 0, "lr": 1e-2, "max_grad_norm": 1e9, "bf16": False}


class SmallBase:
    """A U-Net as `Base` and `PromptEncoder`; it attends in every block, or in the middle alone."""

    cfg = True
    latent_shape = (4, 4, 4)
    device = torch.device("cpu")

    def __init__(self, noise_schedule: NoiseSchedule, everywhere: bool = True) -> None:
        torch.manual_seed(0)
        kind = "CrossAttn" if everywhere else ""
        self.backbone = UNet2DConditionModel(
            sample_size=4, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8,
            attention_head_dim=4, norm_num_groups=4, down_block_types=(f"{kind}DownBlock2D",),
            up_block_types=(f"{kind}UpBlock2D",),
        )  # fmt: skip
        self.backbone.eval().requires_grad_(False)
        self.noise_schedule = noise_schedule

    def call(self, x_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Call:
        dtype = self.backbone.dtype
        return unet_call(x_BCHW.to(dtype), t_B, conditions["context"].to(dtype))

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


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keeps small models on one thread: several would only wait for one another."""
    if not {"make_base", "small_base", "small_run"} & set(request.fixturenames):
        yield  # setting even the same number changes how MKL divides its work, and so the last digits
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_base() -> Callable[..., Any]:
    """Returns a small base model for a noise schedule."""
    return lambda noise_schedule=None, everywhere=True: SmallBase(
        noise_schedule or DiffusionSchedule(), everywhere
    )


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

    def latents(count: int, seed: int = 0) -> Tensor:
        return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(seed))

    return latents


class NumberedImages:
    """A stream of preference images as a `PreferenceDataset`: its n-th is the n-th whoever asks."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []

    def batch(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, list[str]]:
        self.places.append((position, count))
        numbers = range(position, position + count)[part]
        rows = [torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(n)) for n in numbers]
        return torch.stack(rows), [f"image {n}" for n in numbers]

    def pairs(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, Tensor, list[str]]:
        preferred, captions = self.batch(position, count, rng, part)
        return preferred, preferred.flip(dims=(1,)), captions


def letters(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that tells images and prompts apart."""
    lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
    return images.square().mean(dim=(1, 2, 3)) * (1 + lengths) / 100


class Validations:
    """Notes each validation: the first number of the network, its header and the grid; and the last ones."""

    def __init__(self) -> None:
        self.last: list[Path] = []
        self.seen: list[tuple[float, Header, Path]] = []
        self.of_base: list[Path] = []

    def __call__(self, hyperalign: HyperAlign | None, grid: Path, is_last: bool = False) -> dict[str, Any]:
        self.last += [grid] if is_last else []
        if hyperalign is None:
            self.of_base.append(grid)
            return {"letters": 0.0}
        first = float(hyperalign.network.b_aux[0].flatten()[0])
        self.seen.append((first, hyperalign.header, grid))
        return {"letters": first, "more": {"count": len(self.seen)}, "words": "none"}


@pytest.fixture
def small_run(make_base: Callable[..., Any], tmp_path: Path) -> Callable[..., Trainer]:
    """Returns a trainer of the small base, its weights off zero; sections of settings change the recipe."""

    def trainer_of(
        out: Path | None = None,
        *,
        base: Any = None,
        reward: Any = letters,
        accelerator: Accelerator | None = None,
        off_zero: bool = True,
        **sections: dict[str, Any],
    ) -> Trainer:
        config = TrainConfig(
            network=NETWORK,
            model=ModelConfig(**{"statistics_prompts": 4} | sections.get("model", {})),
            objective=ObjectiveConfig(**OBJECTIVE | sections.get("objective", {})),
            optim=OptimConfig(**OPTIM | sections.get("optim", {})),
            data=DataConfig(**sections.get("data", {})),
            alignprop=AlignPropConfig(**sections.get("alignprop", {})),
            kto=KtoConfig(**sections.get("kto", {})),
            grpo=GrpoConfig(**sections.get("grpo", {})),
            spo=SpoConfig(**sections.get("spo", {})),
            validation=ValidationConfig(**{"every": 0} | sections.get("validation", {})),
            run=RunConfig(
                out=out or tmp_path,
                **{"checkpoint_every": 100, "keep_checkpoints": 99} | sections.get("run", {}),
            ),
        )
        base, images = base or make_base(everywhere=False), NumberedImages()
        inputs = RunInputs(
            base=base, encoder=base, prompts=PromptList(["a", "bcd", "efghi", "jk"]),
            preference=images, pairs=images,
            rewards=Rewards({"tiny reward": reward}, config.objective.rewards),
            validate=Validations(), provenance={"reward": "letters", "preference_data": "EmojiScenes"},
        )  # fmt: skip
        run = Trainer(config, inputs, accelerator or Accelerator(cpu=True))
        if off_zero and run.step == 0:
            source = torch.Generator().manual_seed(2)
            for matrix in run.network.b_aux:
                torch.nn.init.normal_(matrix, std=0.3, generator=source)
        return run

    return trainer_of
