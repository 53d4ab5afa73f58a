"""Each family's layers, in order, and their places and dimensions in both hosts, spelt out."""

from __future__ import annotations

import pytest

from hyperalign.errors import HyperAlignError
from hyperalign.families import flux, sd3, unet
from hyperalign.families.dit import Projection, TransformerSpec, fused
from hyperalign.families.flux import FLUX_DEV, FluxSpec
from hyperalign.families.sd3 import SD35_MEDIUM, SD3Spec
from hyperalign.families.unet import SD15, SDXL, TINY, UNetSpec
from hyperalign.targets import Target

SMALL_FLUX = FluxSpec(hidden=8, double_blocks=2, single_blocks=2)
IMAGE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
SECOND = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
DOUBLE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
          "attn.to_out.0", "attn.to_add_out")  # fmt: skip


def names(spec, mode="separate", perception_blocks: int = 4) -> list[str]:
    return [target.name for target in spec.targets(mode, perception_blocks)]


def blocks(stack: str, numbers: range, layers: tuple[str, ...]) -> list[str]:
    return [f"{stack}.{number}.{layer}" for number in numbers for layer in layers]


def test_flux_adapts_double_then_single_blocks() -> None:
    single = blocks("single_transformer_blocks", range(2), IMAGE[:3])
    assert names(SMALL_FLUX) == blocks("transformer_blocks", range(2), DOUBLE) + single
    assert names(SMALL_FLUX, "prefix", 1) == blocks("transformer_blocks", range(1, 2), DOUBLE) + single
    assert {(t.in_features, t.out_features) for t in SMALL_FLUX.targets("separate")} == {(8, 8)}


def test_four_blocks_perceive_unless_told_otherwise() -> None:
    first = FLUX_DEV.targets("prefix")[0]
    assert first == Target("transformer_blocks.4.attn.to_q", 3072, 3072)


@pytest.mark.parametrize(
    ("name", "path", "row"),
    [
        ("transformer_blocks.1.attn.to_q", "double_blocks.1.img_attn.qkv", 0),
        ("transformer_blocks.1.attn.to_k", "double_blocks.1.img_attn.qkv", 8),
        ("transformer_blocks.0.attn.to_v", "double_blocks.0.img_attn.qkv", 16),
        ("transformer_blocks.0.attn.add_q_proj", "double_blocks.0.txt_attn.qkv", 0),
        ("transformer_blocks.0.attn.add_v_proj", "double_blocks.0.txt_attn.qkv", 16),
        ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj", None),
        ("transformer_blocks.0.attn.to_add_out", "double_blocks.0.txt_attn.proj", None),
        ("single_transformer_blocks.1.attn.to_k", "single_blocks.1.linear1", 8),
    ],
)
def test_flux_layers_lie_in_fused_ones(name: str, path: str, row: int | None) -> None:
    place = SMALL_FLUX.place(name)
    assert (place.path, place.first_row) == (path, row)


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.2.attn.to_q", "transformer_blocks.0.attn.to_x", "attn.to_q",
        "single_transformer_blocks.2.attn.to_q", "single_transformer_blocks.0.attn.to_out.0",
    ],
)  # fmt: skip
def test_what_is_no_layer_has_no_place(name: str) -> None:
    with pytest.raises(KeyError):
        SMALL_FLUX.place(name)


def test_perception_reads_the_image_tokens_after_its_last_block() -> None:
    assert SMALL_FLUX.perception_paths(1) == ("transformer_blocks.0", "double_blocks.0")
    assert SMALL_FLUX.perception_paths(2) == ("transformer_blocks.1", "double_blocks.1")
    assert SD3Spec(hidden=8, blocks=5, dual_blocks=2).perception_paths(5) == (
        "transformer_blocks.4", "joint_blocks.4"
    )  # fmt: skip
    assert SMALL_FLUX.feature_channels == (8,)
    for count in (0, -1, 3):
        with pytest.raises(HyperAlignError, match="expected 1 to 2"):
            SMALL_FLUX.perception_paths(count)


def test_a_fingerprint_is_the_family_and_every_dimension() -> None:
    assert SMALL_FLUX.fingerprint() == {
        "family": "flux", "hidden": 8, "double_blocks": 2, "single_blocks": 2, "latent_channels": 16,
        "context_dim": 4096, "guidance": True,
    }  # fmt: skip
    assert SD35_MEDIUM.fingerprint() == {
        "family": "sd3", "hidden": 1536, "blocks": 24, "dual_blocks": 13, "latent_channels": 16,
        "context_dim": 4096,
    }  # fmt: skip
    assert TINY.fingerprint() == {
        "family": "tiny", "in_channels": 4, "block_out_channels": [64, 128, 128], "layers_per_block": 1,
        "cross_attention_dim": 128, "transformer_layers": [1, 1, 1],
    }  # fmt: skip


def test_parts_of_a_fused_layer_are_counted_from_0() -> None:
    assert fused(("q", "k"), "qk") == (Projection("q", "qk", 0), Projection("k", "qk", 1))
    with pytest.raises(NotImplementedError):
        _ = TransformerSpec().stacks


def test_what_the_hosts_need_to_know_of_each_family() -> None:
    told = [(spec.patch, spec.image_output, spec.last_timestep) for spec in (FLUX_DEV, SD35_MEDIUM)]
    assert told == [(2, 0, 1.0), (2, 1, 1000.0)]
    assert FLUX_DEV == FluxSpec(3072, 19, 38, 16, 4096, True)
    assert flux.FLUX_SCHNELL == FluxSpec(3072, 19, 38, 16, 4096, False)
    assert SD35_MEDIUM == SD3Spec(1536, 24, 13, 16, 4096)
    assert (SD15.last_timestep, SD15.feature_channels) == (999.0, (320, 640, 1280, 1280))
    assert [spec.lora_names.keys("a.b")[0] for spec in (FLUX_DEV, SD35_MEDIUM, SDXL)] == [
        "lora_transformer_a_b.lora_down.weight", "transformer.a.b.lora_A.weight",
        "lora_unet_a_b.lora_down.weight",
    ]  # fmt: skip
    assert SD35_MEDIUM.lora_names.keys("a.b")[2] is None


def test_sd3_adapts_blocks_of_two_attentions_of_one_and_a_last_one_whose_text_ends() -> None:
    last = [*IMAGE, TEXT[1], TEXT[2]]
    assert names(SD3Spec(hidden=8, blocks=4, dual_blocks=2)) == [
        *blocks("transformer_blocks", range(2), (*IMAGE, *TEXT, *SECOND)),
        *blocks("transformer_blocks", range(2, 3), (*IMAGE, *TEXT)),
        *blocks("transformer_blocks", range(3, 4), tuple(last)),
    ]
    for dual in (3, 4):
        found = names(SD3Spec(hidden=8, blocks=4, dual_blocks=dual))
        assert found[:36] == blocks("transformer_blocks", range(3), (*IMAGE, *TEXT, *SECOND))
        assert found[36:] == blocks("transformer_blocks", range(3, 4), (*last, *(SECOND if dual > 3 else ())))


def test_sd3_layers_lie_in_fused_ones() -> None:
    spec = SD3Spec(hidden=8, blocks=4, dual_blocks=2)
    for layers, path in ((IMAGE, "x_block.attn"), (TEXT, "context_block.attn"), (SECOND, "x_block.attn2")):
        places = [spec.place(f"transformer_blocks.1.{layer}") for layer in layers]
        assert [place.first_row for place in places] == [0, 8, 16, None]
        assert [place.path for place in places] == [f"joint_blocks.1.{path}.qkv"] * 3 + [
            f"joint_blocks.1.{path}.proj"
        ]
    with pytest.raises(KeyError):
        spec.place("transformer_blocks.2.attn2.to_q")


def test_flux_dimensions_are_read_from_either_host() -> None:
    wanted = FluxSpec(48, 2, 3, 5, 7, False)
    assert wanted == flux.from_diffusers({
        "num_attention_heads": 6, "attention_head_dim": 8, "num_layers": 2, "num_single_layers": 3,
        "in_channels": 20, "joint_attention_dim": 7, "guidance_embeds": False,
    })  # fmt: skip
    config = {
        "image_model": "flux", "hidden_size": 48, "depth": 2, "depth_single_blocks": 3, "in_channels": 5,
        "context_in_dim": 7, "guidance_embed": False,
    }  # fmt: skip
    assert flux.from_comfy(config) == wanted
    assert flux.from_comfy(config | {"image_model": "chroma"}) is None
    assert flux.from_comfy({}) is None


def test_sd3_dimensions_are_read_from_either_host() -> None:
    wanted = SD3Spec(128, 2, 1, 5, 7)
    assert wanted == sd3.from_diffusers({
        "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2, "dual_attention_layers": (0,),
        "in_channels": 5, "joint_attention_dim": 7,
    })  # fmt: skip
    config = {
        "depth": 2, "num_blocks": None, "x_block_self_attn_layers": [0], "in_channels": 5,
        "context_embedder_config": {"params": {"in_features": 7}},
    }  # fmt: skip
    assert sd3.from_comfy(config) == wanted
    assert sd3.from_comfy(config | {"num_blocks": 9}) == SD3Spec(128, 9, 1, 5, 7)
    assert sd3.from_comfy(config | {"x_block_self_attn_layers": None}) == SD3Spec(128, 2, 0, 5, 7)
    assert sd3.from_comfy({"depth": 2}) is None


UNEVEN = UNetSpec("sdxl", 4, (32, 64), 2, 48, (0, 3))
ATTENTIONS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k",
              "attn2.to_v", "attn2.to_out.0")  # fmt: skip


def of_unet(place: str, depth: int) -> list[str]:
    return [f"{place}.transformer_blocks.{layer}.{name}" for layer in range(depth) for name in ATTENTIONS]


def test_a_unet_s_attentions_in_forward_order() -> None:
    """Two levels, the first without attention; one block more on the way up."""
    later = [*of_unet("mid_block.attentions.0", 3), *(
        name for i in range(3) for name in of_unet(f"up_blocks.0.attentions.{i}", 3)
    )]  # fmt: skip
    down = [name for i in range(2) for name in of_unet(f"down_blocks.1.attentions.{i}", 3)]
    assert names(UNEVEN, perception_blocks=0) == down + later
    assert names(UNEVEN, "prefix", 0) == later
    assert [target.name for target in UNEVEN.targets("prefix")] == later


def test_a_unet_s_layers_have_their_level_s_width_and_read_the_text_in_the_second_attention() -> None:
    shapes = {t.name: (t.in_features, t.out_features) for t in TINY.targets("separate")}
    for block, width in (("down_blocks.0", 64), ("up_blocks.2", 64), ("up_blocks.0", 128)):
        found = [shapes[f"{block}.attentions.0.transformer_blocks.0.{name}"] for name in ATTENTIONS]
        source = [width] * 4 + [width, 128, 128, width]
        assert found == [(inside, width) for inside in source]


def test_a_middle_block_without_depth_has_one_layer() -> None:
    middle = [target for target in SD15.targets("separate") if target.name.startswith("mid_block")]
    assert [target.name for target in middle] == of_unet("mid_block.attentions.0", 1)
    assert middle[0].in_features == 1280


@pytest.mark.parametrize(
    ("spec", "name", "path"),
    [
        (SD15, "down_blocks.0.attentions.0.x.y", "input_blocks.1.1.x.y"),
        (SD15, "down_blocks.0.attentions.1.x", "input_blocks.2.1.x"),
        (SD15, "down_blocks.2.attentions.1.x", "input_blocks.8.1.x"),
        (SD15, "up_blocks.1.attentions.2.x", "output_blocks.5.1.x"),
        (TINY, "up_blocks.2.attentions.1.x", "output_blocks.5.1.x"),
        (TINY, "down_blocks.2.attentions.0.x", "input_blocks.5.1.x"),
        (
            SDXL,
            "mid_block.attentions.0.x.mid_block.attentions.0.",
            "middle_block.1.x.mid_block.attentions.0.",
        ),
    ],
)
def test_where_comfyui_keeps_a_unet_s_layers(spec: UNetSpec, name: str, path: str) -> None:
    assert (spec.place(name).path, spec.place(name).first_row) == (path, None)


def test_perception_reads_the_last_feature_of_each_resolution() -> None:
    assert SD15.perception_input_blocks == (2, 5, 8, 11)
    assert SDXL.perception_input_blocks == (2, 5, 8)


DIFFUSERS = {
    "block_out_channels": [32, 64], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "cross_attention_dim": 2048, "in_channels": 4, "layers_per_block": 2,
}  # fmt: skip


def test_a_unet_s_dimensions_are_read_from_diffusers() -> None:
    wanted = UNetSpec("sdxl", 4, (32, 64), 2, 2048, (0, 3))
    assert unet.from_diffusers(DIFFUSERS | {"transformer_layers_per_block": 3}) == wanted
    assert unet.from_diffusers(DIFFUSERS | {"transformer_layers_per_block": [1, 3]}) == wanted
    assert unet.from_diffusers(DIFFUSERS).transformer_layers == (0, 1)
    families = [unet.from_diffusers(DIFFUSERS | {"cross_attention_dim": width}).family
                for width in (128, 768, 2048, 1024)]  # fmt: skip
    assert families == ["tiny", "sd15", "sdxl", "unknown"]


def test_a_unet_s_dimensions_are_read_from_comfyui() -> None:
    config = {
        "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10], "context_dim": 2048,
        "in_channels": 4, "model_channels": 320, "channel_mult": (1, 2, 4),
    }  # fmt: skip
    assert unet.from_comfy(config) == SDXL
    uneven = config | {"num_res_blocks": [1, 2, 3], "transformer_depth": [5, 6, 6, 7, 7, 7]}
    found = unet.from_comfy(uneven)
    assert found is not None
    assert (found.layers_per_block, found.transformer_layers) == (1, (5, 6, 7))
    no_text = unet.from_comfy(config | {"context_dim": None})
    assert no_text is not None
    assert (no_text.family, no_text.cross_attention_dim) == ("unknown", 0)
    for missing in ("num_res_blocks", "channel_mult"):
        assert unet.from_comfy({key: value for key, value in config.items() if key != missing}) is None


def test_the_published_u_nets() -> None:
    assert SD15 == unet.from_diffusers({
        "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "in_channels": 4,
        "layers_per_block": 2, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    })  # fmt: skip


def test_the_middle_block_is_as_wide_and_deep_as_the_last_level() -> None:
    spec = UNetSpec("sdxl", 4, (8, 16, 32), 1, 48, (1, 2, 3))
    middle = [target for target in spec.targets("separate") if target.name.startswith("mid_block")]
    assert [target.name for target in middle] == of_unet("mid_block.attentions.0", 3)
    assert {target.out_features for target in middle} == {32}


def test_dimensions_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        UNetSpec("sdxl", 4, (8, 16, 32), 1, 48, (1, 2)).targets("separate")
    with pytest.raises(ValueError, match="zip"):
        unet.from_diffusers(DIFFUSERS | {"transformer_layers_per_block": [1, 2, 3]})
