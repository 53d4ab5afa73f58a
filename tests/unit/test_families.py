"""Every family's targets, against the real architecture at its true size (on the meta device: no memory)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from hyperalign.errors import HyperAlignError
from hyperalign.families.flux import FLUX_DEV, FLUX_SCHNELL
from hyperalign.families.sd3 import SD35_MEDIUM, SD3Spec
from hyperalign.families.unet import SD15, SDXL
from hyperalign.hosts.diffusers.adapter import spec_of
from hyperalign.perception import token_map
from hyperalign.targets import BaseSpec


def sd15() -> nn.Module:
    return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)


def sdxl() -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
    )  # fmt: skip


def sd3(blocks: int, dual_blocks: int) -> nn.Module:
    return SD3Transformer2DModel(
        num_layers=blocks, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(dual_blocks)), qk_norm="rms_norm",
    )  # fmt: skip


MODELS: list[tuple[BaseSpec, Callable[[], nn.Module], int, int]] = [
    (SD15, sd15, 16 * 8, 10 * 8),
    (SDXL, sdxl, 70 * 8, 46 * 8),
    (FLUX_DEV, lambda: FluxTransformer2DModel(guidance_embeds=True), 19 * 8 + 38 * 3, 15 * 8 + 38 * 3),
    (FLUX_SCHNELL, FluxTransformer2DModel, 19 * 8 + 38 * 3, 15 * 8 + 38 * 3),
    (SD3Spec(blocks=6, dual_blocks=6), lambda: sd3(6, 6), 5 * 12 + 10, 12 + 10),
    (SD35_MEDIUM, lambda: sd3(24, 13), 13 * 12 + 10 * 8 + 6, 9 * 12 + 10 * 8 + 6),
]


@pytest.mark.parametrize(
    ("spec", "build", "separate", "prefix"), MODELS, ids=["sd15", "sdxl", "dev", "schnell", "dual", "sd35"]
)
def test_targets_are_the_true_models_layers(
    spec: BaseSpec, build: Callable[[], nn.Module], separate: int, prefix: int
) -> None:
    with torch.device("meta"):
        model = build()
    assert spec_of(model) == spec
    for target in spec.targets("separate"):
        layer = model.get_submodule(target.name)
        assert (layer.in_features, layer.out_features) == (target.in_features, target.out_features)
    assert len(spec.targets("separate")) == separate
    assert len(spec.targets("prefix")) == prefix
    assert set(spec.targets("prefix")) < set(spec.targets("separate"))


def test_dev_and_schnell_are_told_apart() -> None:
    assert FLUX_DEV.fingerprint() != FLUX_SCHNELL.fingerprint()


def test_fused_places_do_not_overlap() -> None:
    for spec in (FLUX_DEV, SD35_MEDIUM):
        places = [spec.place(target.name) for target in spec.targets("separate")]
        assert len(set(places)) == len(places)


def test_a_name_that_is_no_target_has_no_place() -> None:
    with pytest.raises(KeyError):
        FLUX_DEV.place("transformer_blocks.19.attn.to_q")


@pytest.mark.parametrize("blocks", [0, 20])
def test_perception_needs_blocks_that_exist(blocks: int) -> None:
    with pytest.raises(HyperAlignError, match=rf"first {blocks} blocks; expected 1 to 19 for this flux"):
        FLUX_DEV.perception_paths(blocks)


def test_an_unknown_class_is_refused_by_name() -> None:
    with pytest.raises(HyperAlignError, match="base model is a Linear; HyperAlign knows UNet2D"):
        spec_of(nn.Linear(1, 1))


def test_tokens_become_a_map_and_reference_images_stay_out() -> None:
    tokens = torch.arange(2 * 7 * 3.0).reshape(2, 7, 3)
    maps = token_map(tokens, (2, 3))
    assert maps.shape == (2, 3, 2, 3)
    assert torch.equal(maps[1, :, 1, 2], tokens[1, 5])
