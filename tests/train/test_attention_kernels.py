"""Attention on a GPU runs with the kernels that were chosen, and a check tries them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperalign.errors import HyperAlignError
from train import trainer as loop
from train.config import AttentionKernel, RunConfig, TrainConfig
from train.models.architectures import ModelSize
from train.models.kernels import attention_kernels
from train.preflight.attention import try_attention
from train.preflight.smoke import smoke_config
from train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = {"flux_s": ModelSize(1, 1, 12), "sd35m_s": ModelSize(1, 0, 12), "sd15_s": ModelSize(width_divisor=10)}


def allowed() -> dict[str, bool]:
    found = torch.backends.cuda
    return {
        "flash": found.flash_sdp_enabled(),
        "efficient": found.mem_efficient_sdp_enabled(),
        "cudnn": found.cudnn_sdp_enabled(),
        "math": found.math_sdp_enabled(),
    }


def test_cudnn_is_never_chosen_by_default() -> None:
    before = allowed()
    with attention_kernels(RunConfig().attention_kernels, GPU):
        assert allowed() == {"flash": True, "efficient": True, "cudnn": False, "math": True}
    assert allowed() == before
    with attention_kernels(RunConfig().attention_kernels, CPU):
        assert allowed() == before


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "math"])
def test_a_recipe_may_choose_one(kernel: AttentionKernel) -> None:
    with attention_kernels((kernel,), GPU):
        assert [name for name, on in allowed().items() if on] == [kernel]


def test_both_passes_of_a_step_and_the_validation_run_with_them(
    small_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, inside, backward = list[Any](), list[bool](), list[bool]()

    @contextlib.contextmanager
    def noted(kernels: Any, device: torch.device) -> Iterator[None]:
        chosen.append((kernels, device.type))
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(loop, "attention_kernels", noted)
    run = small_run(validation={"every": 1}, run={"attention_kernels": ("math",)})
    run.network.b_aux[0].register_hook(lambda _: backward.append(bool(inside)))
    run.fit()
    assert chosen == [(("math",), "cpu")] * 3  # the base model's validation, the step, its validation
    assert backward
    assert all(backward)


@pytest.mark.parametrize("recipe", SMALL)
def test_a_block_of_the_recipes_shape_runs_both_ways(recipe: str) -> None:
    config = smoke_config(load_recipe(RECIPES / f"{recipe}.toml"))
    said = try_attention(config, CPU, SMALL[recipe])
    assert said == "attention: flash, efficient, math, in this order; a block at 64 pixels ran both ways"


def test_a_kernel_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    config: TrainConfig = smoke_config(load_recipe(RECIPES / "flux_s.toml"))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, attention_kernels=("cudnn",)))

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    with pytest.raises(
        HyperAlignError,
        match=r"^attention of flux at 64 pixels fails here with the kernels cudnn: CUDA error: an illegal "
        r"memory access was encountered. Set run.attention_kernels to others of flash, efficient, cudnn, "
        r"math.$",
    ):
        try_attention(config, CPU, SMALL["flux_s"])


def test_no_kernel_at_all_is_refused() -> None:
    with pytest.raises(HyperAlignError, match=r"run.attention_kernels is \(\); expected one or more"):
        TrainConfig(run=RunConfig(attention_kernels=()))
