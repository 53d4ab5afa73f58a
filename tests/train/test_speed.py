"""What makes a step faster on a GPU: no result changes, and no value is read before the step ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from smoke_recipes import RECIPES, cut_down
from torch.utils._python_dispatch import TorchDispatchMode

from train.config import TrainConfig
from train.inputs import smoke_inputs
from train.models.architectures import ModelSize, descending_sizes
from train.models.speed import repeated_blocks, speed_up
from train.objective import without_nan
from train.processes import gradient_of
from train.trainer import Trainer

READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
"""What makes Python wait for a GPU."""


class Reads(TorchDispatchMode):
    """Counts the values that Python asks tensors for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in READS
        return func(*args, **(kwargs or {}))


def small(recipe: str, out: Path, **model: Any) -> TrainConfig:
    config = cut_down(RECIPES / f"{recipe}.toml", out)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def trainer(config: TrainConfig, shape: ModelSize | None = None) -> Trainer:
    accelerator = Accelerator(cpu=True)
    shape = shape or list(descending_sizes(config.model.base))[-1]
    return Trainer(config, smoke_inputs(config, accelerator, shape), accelerator)


@pytest.mark.parametrize("recipe", ["sd15_s", "sd15_p", "sdxl_s", "flux_s", "sd35m_s"])
def test_the_passes_of_a_step_read_no_value(recipe: str, tmp_path: Path) -> None:
    run = trainer(small(recipe, tmp_path))
    next(run._updates())  # what depends on the latents' shape alone is read once in a run
    with Reads() as reads:
        metrics = next(run._updates())
    assert reads.count == 0
    assert {"reward_loss", "preference_loss", "reward"} <= metrics.keys()


def test_reads_are_counted() -> None:
    _, finite_B = without_nan(torch.zeros(2, 3, 4, 4))
    with Reads() as reads:
        assert bool(finite_B.all())
    assert reads.count == 1


def gradients(run: Trainer) -> tuple[torch.Tensor, float]:
    metrics = next(run._updates())
    return gradient_of(run.network.parameters()), float(metrics["preference_loss"])


FEW_BLOCKS = ModelSize(double_blocks=3, single_blocks=1, width_divisor=12)
"""Of FLUX.1, as each block takes seconds to compile."""


@pytest.mark.parametrize(("recipe", "shape"), [("sd15_s", None), ("flux_s", FEW_BLOCKS)])
def test_compiled_blocks_give_the_same_gradients(
    recipe: str, shape: ModelSize | None, tmp_path: Path
) -> None:
    blocks = {} if shape is None else {"perception_blocks": 2}
    plain = gradients(trainer(small(recipe, tmp_path, **blocks), shape))
    run = trainer(small(recipe, tmp_path, **blocks), shape)
    base: Any = run.base
    compiled = dataclasses.replace(run.config.model, compile=True)
    torch._dynamo.reset()
    speed_up(compiled, base, [], backend="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = gradients(run)
    torch._dynamo.reset()
    assert all(block._compiled_call_impl is not None for block in repeated_blocks(base.backbone))
    torch.testing.assert_close(found[0], plain[0], rtol=1e-3, atol=1e-3 * float(plain[0].abs().max()))
    assert found[1] == pytest.approx(plain[1], rel=1e-4)


def test_channels_last_is_a_layout_and_changes_no_gradient(tmp_path: Path) -> None:
    plain = gradients(trainer(small("sd15_s", tmp_path)))
    run = trainer(small("sd15_s", tmp_path, channels_last=True))
    base: Any = run.base
    for module in (base.backbone.conv_in, base.autoencoder.module.decoder.conv_in):
        assert module.weight.is_contiguous(memory_format=torch.channels_last)
    found = gradients(run)
    torch.testing.assert_close(found[0], plain[0], rtol=1e-3, atol=1e-3 * float(plain[0].abs().max()))
    assert found[1] == pytest.approx(plain[1], rel=1e-4)
