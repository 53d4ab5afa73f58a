"""The hypernetwork on a real diffusers U-Net: identity at the start, rows apart, gradients alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from hyperalign.errors import HyperAlignError
from hyperalign.families.unet import SD15, TINY
from hyperalign.hosts.diffusers.adapter import Adapter, spec_of, unet_call
from hyperalign.hosts.diffusers.session import attach
from hyperalign.hypernetwork import HyperNetworkConfig
from hyperalign.perception import pool_features
from hyperalign.schedule import Schedule
from hyperalign.targets import PerceptionMode

MODES: tuple[PerceptionMode, ...] = ("prefix", "separate")


@pytest.mark.parametrize("mode", MODES)
def test_an_untrained_hypernetwork_is_the_base_model_bit_for_bit(
    make_hyperalign: Any, inputs: Any, unet: UNet2DConditionModel, mode: PerceptionMode
) -> None:
    x, t, context = inputs()
    with torch.no_grad():
        adapted, _ = Adapter(unet, make_hyperalign(mode, trained=False)).generate_and_forward(
            unet_call(x, t, context)
        )
        assert torch.equal(adapted, unet(x, t, context).sample)


@pytest.mark.parametrize("mode", MODES)
def test_every_tensor_has_a_gradient_by_the_second_step(
    make_hyperalign: Any, inputs: Any, unet: UNet2DConditionModel, mode: PerceptionMode
) -> None:
    hyperalign = make_hyperalign(mode, trained=False)
    adapter, network = Adapter(unet, hyperalign), hyperalign.network
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3)
    x, t, context = inputs(2)
    for _ in range(2):
        optimiser.zero_grad()
        (adapter.generate_and_forward(unet_call(x, t, context))[0] - 1).square().mean().backward()
        dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        optimiser.step()
    assert dead == []


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_batch_do_not_see_each_other(
    make_hyperalign: Any, inputs: Any, unet: UNet2DConditionModel, mode: PerceptionMode
) -> None:
    adapter = Adapter(unet, make_hyperalign(mode))
    x, t, context = inputs()
    with torch.no_grad():
        together, cores = adapter.generate_and_forward(unet_call(x, t, context))
        alone = [
            adapter.generate_and_forward(unet_call(x[i : i + 1], t[i : i + 1], context[i : i + 1]))[0]
            for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    assert (cores[0] - cores[1]).abs().max() > 1e-3


def test_generating_mid_forward_equals_perceiving_first(
    make_hyperalign: Any, inputs: Any, unet: UNet2DConditionModel
) -> None:
    hyperalign = make_hyperalign("prefix")
    adapter = Adapter(unet, hyperalign)
    x, t, context = inputs()
    with torch.no_grad():
        one_pass, cores = adapter.generate_and_forward(unet_call(x, t, context))
        two_pass = adapter.forward(
            unet_call(x, t, context), hyperalign.network(adapter.perceive(unet_call(x, t, context)))
        )
        assert torch.equal(one_pass, two_pass)
        assert torch.equal(
            adapter.forward(unet_call(x, t, context), cores, strength=0.0), unet(x, t, context).sample
        )


def test_static_core_is_the_same_for_all_rows(
    make_hyperalign: Any, inputs: Any, unet: UNet2DConditionModel
) -> None:
    adapter = Adapter(unet, make_hyperalign(conditioning="none"))
    _, cores = adapter.generate_and_forward(unet_call(*inputs()))
    assert torch.equal(cores[0], cores[1])


@pytest.mark.parametrize(("schedule", "expected"), [("S", 5), ("I", 1), ("P", 3)])
def test_attach_writes_weights_when_due_and_restores_the_unet(
    make_hyperalign: Any, inputs: Any, unet: UNet2DConditionModel, schedule: str, expected: int
) -> None:
    hyperalign = make_hyperalign(schedule=Schedule("P", (0.7, 0.3)))
    x, _, context = inputs(1)
    base = unet(x, 800, context).sample
    with attach(unet, hyperalign, variant=schedule) as session:  # pyright: ignore[reportArgumentType]
        changed = [unet(x, t, context).sample for t in (999, 800, 600, 400, 100)]
        assert (session.evaluations, session.generations) == (5, expected)
    assert (changed[1] - base).abs().max() > 1e-3
    assert torch.equal(unet(x, 800, context).sample, base)


def test_attach_restores_after_an_exception(
    make_hyperalign: Any, inputs: Any, unet: UNet2DConditionModel
) -> None:
    x, _, context = inputs(1)
    base = unet(x, 800, context).sample
    with pytest.raises(RuntimeError), attach(unet, make_hyperalign()):
        unet(x[:, :2], 800, context)
    assert torch.equal(unet(x, 800, context).sample, base)


def test_attach_refuses_a_strength_that_is_no_number(
    make_hyperalign: Any, unet: UNet2DConditionModel
) -> None:
    with (
        pytest.raises(HyperAlignError, match="strength is nan"),
        attach(unet, make_hyperalign(), strength=float("nan")),
    ):
        pass


def test_another_base_model_is_refused_with_both_sides_named(make_hyperalign: Any) -> None:
    other = UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64, 64), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128,
    )  # fmt: skip
    with pytest.raises(
        HyperAlignError, match=r"block_out_channels is \[32, 64, 64\] and should be \[64, 128, 128\]"
    ):
        Adapter(other, make_hyperalign())


def test_targets_exist_with_their_shapes(unet: UNet2DConditionModel) -> None:
    assert spec_of(unet) == TINY
    for target in TINY.targets("separate"):
        module = unet.get_submodule(target.name)
        assert (module.in_features, module.out_features) == (target.in_features, target.out_features)
    assert len(TINY.targets("separate")) == 80
    assert len(TINY.targets("prefix")) == 56


def test_comfy_names_and_perception_blocks() -> None:
    assert SD15.place("down_blocks.1.attentions.0.x").path == "input_blocks.4.1.x"
    assert SD15.place("mid_block.attentions.0.x").path == "middle_block.1.x"
    assert SD15.place("up_blocks.3.attentions.2.x").path == "output_blocks.11.1.x"
    assert TINY.perception_input_blocks == (1, 3, 5)


def test_perception_never_has_more_than_256_tokens() -> None:
    pooled = pool_features([torch.zeros(1, 2, 64, 48), torch.zeros(1, 2, 7, 5), torch.zeros(1, 2, 1, 1)])
    assert sum(f.shape[-1] * f.shape[-2] for f in pooled) <= 256


@pytest.mark.parametrize("field", ["rank", "a", "b", "width", "layers", "heads"])
def test_sizes_must_be_whole_and_positive(field: str) -> None:
    with pytest.raises(HyperAlignError, match=field):
        HyperNetworkConfig(**{field: 0})
