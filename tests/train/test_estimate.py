"""Estimates against torch's counter, against published totals, and against the trainer's own step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.rewards import clip
from hyperalign.rewards.clip import ClipShape, Tower
from hyperalign.schedule import Variant
from train import inputs
from train.config import (
    BaseName,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)
from train.inputs import smoke_inputs
from train.methods.passes import rollout_share
from train.models.architectures import FULL_SIZES, ModelSize, architecture, autoencoder
from train.models.base import with_guidance
from train.preflight.costs import NOTHING, Cost, Tally, cost_of, flash_attention, matrix_rate
from train.preflight.estimate import (
    ASSUMED_SHARE,
    frozen_bytes,
    gain_work,
    generations,
    step_memory,
    step_seconds,
    step_work,
    validation_work,
)
from train.preflight.step_costs import (
    META,
    StepCosts,
    meta_base,
    meta_conditions,
    step_costs,
    without_recomputation,
)
from train.trainer import Trainer

SMALL = {
    "sd15": ModelSize(width_divisor=10),
    "sdxl": ModelSize(width_divisor=10),
    "flux": ModelSize(double_blocks=3, single_blocks=2, width_divisor=12),
    "sd3": ModelSize(double_blocks=4, width_divisor=12),
}
GIB = 2**30
ROW = Cost(2.0, 5.0, 3 * GIB, 4 * GIB)
PARTS = StepCosts(
    sampling=Cost(1.0, 0.0, 0, GIB), training=ROW, perception=0.5, generation=Cost(0.1, 0.2, 0, 0),
    decoding=Cost(3.0, 7.0, GIB, 6 * GIB), scoring=Cost(1.0, 2.0, GIB, 2 * GIB),
    parameters={"backbone": 100, "autoencoder": 10, "hypernetwork": 5}, targets=3,
    cfg=True,
)  # fmt: skip


def config_of(base: BaseName, out: Path = Path(), **objective: Any) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(base=base, resolution=64, perception_blocks=2),
        network=HyperNetworkConfig(layers=1, width=32, heads=4),
        objective=ObjectiveConfig(**({
            "rewards": {"clip": 1.0}, "prompt_batch": 2, "rollout_steps": 3, "timesteps": 1,
            "preference_batch": 2, "skip_first": 2, "micro_batch": 2, "guidance_scale": 3.0,
        } | objective)),
        optim=OptimConfig(bf16=False),
        data=DataConfig(text_lengths=(32,)),
        validation=ValidationConfig(every=0),
        run=RunConfig(out=out),
    )  # fmt: skip


def with_model(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def with_objective(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, **changes))


def meta_models(base: BaseName, shape: ModelSize) -> tuple[nn.Module, nn.Module]:
    with META:
        return architecture(base, shape), inputs.autoencoder(base)


def small_decoder(base: BaseName, _size: ModelSize | None = None) -> nn.Module:
    true: Any = autoencoder(base)
    return AutoencoderKL.from_config({**true.config, "block_out_channels": (32, 32, 64, 64)})


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same decoder and reward at widths that a test can afford."""
    shape = ClipShape(Tower(64, 2, 4), Tower(48, 2, 4), 32, "gelu", patch=32)
    monkeypatch.setattr(clip, "VIT_L_14", shape)
    monkeypatch.setattr(inputs, "autoencoder", small_decoder)


def test_a_row_of_a_reduced_backbone_costs_what_torch_counts() -> None:
    for base in ("sd15", "flux"):
        config = without_recomputation(config_of(base))
        model = meta_base(config, *meta_models(base, SMALL[base]))
        with META:
            x, t = torch.randn(1, *model.latent_shape), torch.ones(1)
        call = model.call(x, t, with_guidance(model, meta_conditions(config, 32), 1.0))
        # Without a gradient torch's counter leaves out half of cross-attention's backward pass.
        tensors = {name: value for name, value in call.items() if isinstance(value, Tensor)}
        call = call | {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}

        def forward(model: Any = model, call: Any = call) -> Tensor:
            return model.backbone(**call)[0]

        found = cost_of(forward)
        with FlopCounterMode(display=False) as counter:
            output = forward()
            there = counter.get_total_flops()
            output.mean().backward()
        assert (found.forward, found.forward + found.backward) == (there, counter.get_total_flops())


def pairs_of_tokens(*layers: tuple[int, int, int, int]) -> int:
    """Operations of attention: (tokens, tokens attended to, width, layers) each."""
    return sum(4 * queries * keys * width * count for queries, keys, width, count in layers)


@pytest.mark.parametrize(
    ("base", "published", "attention"),
    [
        # 338,749,194,240 multiplications: github.com/Nota-NetsPresso/BK-SDM/issues/53
        ("sd15", 2 * 338.749e9, pairs_of_tokens(
            (4096, 4096 + 77, 320, 5), (1024, 1024 + 77, 640, 5), (256, 256 + 77, 1280, 5),
            (64, 64 + 77, 1280, 1),
        )),
        # 5,979.1 and 59,529.5 billion: huggingface.co/datasets/diffusers/benchmarks
        ("sdxl", 5979.1e9, pairs_of_tokens((4096, 4096 + 77, 640, 10), (1024, 1024 + 77, 1280, 60))),
        ("flux", 59529.5e9, pairs_of_tokens((4608, 4608, 3072, 57))),
    ],
)  # fmt: skip
def test_true_backbones_cost_what_others_have_published(
    base: BaseName, published: float, attention: float
) -> None:
    """The published totals leave the products of attention out."""
    config = with_model(config_of(base), resolution=512 if base == "sd15" else 1024)
    model = meta_base(config, *meta_models(base, FULL_SIZES[base]))
    with META:
        x, t = torch.randn(1, *model.latent_shape), torch.ones(1)
    conditions = meta_conditions(config, 512 if base == "flux" else 77)
    call = model.call(x, t, with_guidance(model, conditions, 1.0))
    with torch.no_grad():
        found = cost_of(lambda: model.backbone(**call)[0]).forward
    assert found - attention == pytest.approx(published, rel=1e-3)


def test_the_decoder_costs_what_others_have_published() -> None:
    """1,240,079,532,032 multiplications, attention left out: github.com/Nota-NetsPresso/BK-SDM/issues/53."""
    config = with_model(config_of("sd15"), resolution=512)
    model = meta_base(config, *meta_models("sd15", SMALL["sd15"]))
    with META, torch.no_grad():
        x = torch.randn(1, *model.latent_shape)
        found = cost_of(lambda: model.decode(x)).forward
    assert found - pairs_of_tokens((4096, 4096, 512, 1)) == pytest.approx(2 * 1240.08e9, rel=1e-3)


def run_sines(times: int, around: Callable[..., Tensor]) -> Cost:
    with META:
        x = torch.zeros(1000, requires_grad=True)

    def sines(y: Tensor) -> Tensor:
        for _ in range(times):
            y = y.sin()
        return y

    return cost_of(lambda: around(sines, x))


def test_bytes_are_those_of_tensors_alive_at_once() -> None:
    plain = run_sines(5, lambda run, x: run(x))
    assert plain.kept == 5 * 4000
    with torch.no_grad():
        assert run_sines(5, lambda run, x: run(x)).peak == 2 * 4000
    saved = run_sines(5, lambda run, x: checkpoint(run, x, use_reentrant=False))
    assert saved.kept == 4000
    assert saved.peak > saved.kept
    with META, Tally() as tally:
        x = torch.zeros(1000)
        views = [x.view(10, 100).T, x[:5], x.add_(1)]
        assert (tally.bytes, tally.peak) == (4000, 4000)
        del x, views
        assert tally.bytes == 0


def test_attention_keeps_no_matrix_of_all_pairs_and_is_put_back() -> None:
    own = nn.functional.scaled_dot_product_attention
    with META:
        q = torch.zeros(1, 1, 1000, 64, requires_grad=True)
    assert cost_of(lambda: nn.functional.scaled_dot_product_attention(q, q, q)).peak < 4 * 1000**2
    with pytest.raises(ZeroDivisionError), flash_attention():
        raise ZeroDivisionError
    assert nn.functional.scaled_dot_product_attention is own


CASES: dict[str, tuple[BaseName, dict[str, Any], dict[str, Any]]] = {
    "S prefix with all of guidance": ("sd15", {}, {}),
    "S prefix with half of it": ("sd15", {}, {"conditional_only": True}),
    "P separate": ("sd15", {"variant": "P", "key_times": (0.6,), "mode": "separate"}, {}),
    "I prefix": ("flux", {"variant": "I"}, {}),
    "S separate in small batches": ("flux", {"mode": "separate"}, {"micro_batch": 1}),
    "S prefix from noised images": ("flux", {"gradient_checkpointing": "decoder"}, {"state": "noised"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_models")
def test_the_trainers_own_step_takes_what_is_estimated(case: str, tmp_path: Path) -> None:
    base, model, objective = CASES[case]
    config = with_model(config_of(base, tmp_path, **objective), **model)
    accelerator = Accelerator(cpu=True)
    trainer = Trainer(config, smoke_inputs(config, accelerator, SMALL[base]), accelerator)
    for parameter in trainer.network.parameters():  # the optimiser's bytes count the gradients
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimiser.zero_grad = lambda: None
    with sdpa_kernel(SDPBackend.MATH), Tally() as tally:  # torch does not count the kernel of a processor
        trainer._train_step()
    parts = step_costs(config, *meta_models(base, SMALL[base]))
    memory = step_memory(config, parts)
    assert tally.operations == pytest.approx(step_work(config, parts).total, rel=0.03)
    assert tally.peak == pytest.approx(memory.peak - memory.weights - memory.optimiser, rel=0.2)


@given(steps=st.integers(2, 12), skip=st.integers(0, 11), count=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_share_of_a_rollout_is_that_of_random_picks(steps: int, skip: int, count: int, seed: int) -> None:
    skip = min(skip, steps - 1)
    count = min(count, steps - skip)
    config = config_of("sd15", rollout_steps=steps, skip_first=skip, timesteps=count)
    rng = np.random.default_rng(seed)
    run = [max(rng.choice(np.arange(skip, steps), count, replace=False)) for _ in range(300)]
    assert rollout_share(config) == pytest.approx(np.mean(run) / steps, abs=0.08)


def test_memory_is_what_lies_there_and_the_greatest_moment() -> None:
    config = config_of("sd15")
    memory = step_memory(config, PARTS)
    assert memory.weights == frozen_bytes(config, PARTS) == 4 * 110
    assert memory.optimiser == 20 * 5
    # Four rows of two images wait for a decoder that keeps 1 GiB and peaks at 6 GiB an image.
    assert memory.decoder == (4 * 3 + 2 * 6) * GIB
    assert memory.reward == (4 * 3 + 2 * (1 + 2)) * GIB
    assert memory.peak == memory.weights + memory.optimiser + memory.decoder


@given(factor=st.integers(2, 9))
def test_work_grows_with_images_and_memory_does_not(factor: int) -> None:
    once = config_of("sd15", state="noised")
    more = with_objective(
        once,
        prompt_batch=factor * once.objective.prompt_batch,
        preference_batch=factor * once.objective.preference_batch,
    )
    assert step_work(more, PARTS).total == pytest.approx(factor * step_work(once, PARTS).total)
    assert step_memory(more, PARTS) == step_memory(once, PARTS)


def test_a_loss_that_is_off_takes_nothing() -> None:
    config = config_of("sd15", reward_weight=0.0)
    work, memory = step_work(config, PARTS), step_memory(config, PARTS)
    assert (work.rollout, work.reward, memory.reward, memory.decoder, memory.backbone) == (0, 0, 0, 0, 0)
    assert step_work(with_objective(config, preference_weight=0.0, reward_weight=1.0), PARTS).preference == 0


def test_gradient_through_the_prompts_rows_alone_takes_half_of_the_graph() -> None:
    both, one = (config_of("sd15", conditional_only=only) for only in (False, True))
    assert step_memory(one, PARTS).backbone == step_memory(both, PARTS).backbone / 2
    saved = step_work(both, PARTS).reward - step_work(one, PARTS).reward
    assert saved == pytest.approx(2 * (7.3 - 1.1))  # two rows need a forward pass in place of all


@pytest.mark.parametrize(("variant", "count"), [("S", 10), ("P", 4), ("I", 1)])
def test_weights_are_written_as_often_as_the_variant_says(variant: Variant, count: int) -> None:
    config = with_model(config_of("sd15"), variant=variant, key_count=3)
    assert generations(config, 10) == count
    assert generations(with_model(config, variant="P", key_times=(0.5,)), 10) == 2


def test_processes_share_a_validation() -> None:
    config = dataclasses.replace(
        config_of("sd15"), validation=ValidationConfig(every=10, prompt_count=32, steps=4)
    )
    assert validation_work(config, PARTS, 4) == pytest.approx(validation_work(config, PARTS) / 4)
    assert gain_work(config, PARTS, 4) == pytest.approx(gain_work(config, PARTS) / 4)
    work = step_work(config, PARTS).total + validation_work(config, PARTS) / 10
    last = gain_work(config, PARTS) / config.optim.steps
    assert step_seconds(config, PARTS, 1e12) == pytest.approx((work + last) / 1e12 / ASSUMED_SHARE)


def test_conditioning_is_measured_on_what_is_conditional() -> None:
    config = dataclasses.replace(
        config_of("sd15"), validation=ValidationConfig(every=10, prompt_count=32, steps=4)
    )
    static = dataclasses.replace(config, network=HyperNetworkConfig(conditioning="none"))
    assert gain_work(static, PARTS) == 0.0
    assert gain_work(config, PARTS) == pytest.approx(5 * validation_work(static, PARTS))
    images = 2 * 32 * 4  # both halves of 32 prompts and 2 seeds, for 4 steps
    assert validation_work(config, PARTS) > validation_work(static, PARTS) > images * PARTS.sampling.forward
    off = dataclasses.replace(config, validation=ValidationConfig(every=0))
    assert gain_work(off, PARTS) == validation_work(off, PARTS) == 0.0


def test_graphs_beside_each_other_wait_for_each_other() -> None:
    assert NOTHING.beside(ROW) == ROW
    both = ROW.beside(Cost(1.0, 1.0, GIB, 9 * GIB))
    assert both == Cost(3.0, 6.0, 4 * GIB, 12 * GIB)


def test_a_rate_is_measured() -> None:
    assert matrix_rate(torch.device("cpu"), torch.float32, repeats=1) > 1e8
