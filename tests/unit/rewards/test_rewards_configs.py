"""Heads, activations and epsilons, which do not affect shapes, against the published configurations."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import nn
from transformers.activations import ACT2FN

from hyperalign.geneval import detector
from hyperalign.rewards import clip, loading
from hyperalign.rewards.clip import ClipShape

Facts = dict[str, Any]
"""heads, activation and eps of an encoder, as its modules have them."""


@pytest.fixture(autouse=True)
def small_architectures() -> None:
    """Overrides the reduction: here they have their true sizes."""


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return loading.PUBLISHED[name].network()


def only(values: Iterable[Any]) -> Any:
    """Returns the one value that all layers have."""
    (value,) = set(values)
    return value


def facts(encoder: nn.Module) -> Facts:
    """Returns what the modules compute with, whatever the configuration was called."""
    modules: list[Any] = list(encoder.modules())
    heads = {getattr(m, "num_heads", None) or getattr(m, "num_attention_heads", None) for m in modules}
    activations = (getattr(m, key, None) for m in modules for key in ("activation_fn", "intermediate_act_fn"))
    return {
        "heads": only(heads - {None}),
        "activation": only(type(one) for one in activations if one is not None),
        "eps": only(m.eps for m in modules if isinstance(m, nn.LayerNorm)),
    }


def expected(heads: int, activation: str, eps: float) -> Facts:
    return {"heads": heads, "activation": type(ACT2FN[activation]), "eps": eps}


def test_the_names_of_activations_are_different_functions() -> None:
    names = ("gelu", "quick_gelu", "gelu_pytorch_tanh", "relu")
    assert len({type(ACT2FN[name]) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "shape"), [("ViT-H-14", clip.VIT_H_14), ("ViT-L-14-quickgelu", clip.VIT_L_14)]
)
def test_clip_has_open_clip_s_heads_activation_and_eps(name: str, shape: ClipShape) -> None:
    """HPS v2, v2.1 and PickScore are ViT-H-14; CLIP score and LAION aesthetic are OpenAI's L/14."""
    config = json.loads((Path(open_clip.__file__).parent / f"model_configs/{name}.json").read_text())
    quick = config.get("quick_gelu", False)
    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    with torch.device("meta"):
        official, ours = CLIP(config["embed_dim"], vision, text, quick), clip.ClipNetwork(shape).clip
    for theirs, found in ((official.visual, ours.vision_model), (official.transformer, ours.text_model)):
        blocks: Any = [block for block in theirs.modules() if isinstance(block, ResidualAttentionBlock)]
        kind = only(type(block.mlp.gelu) for block in blocks)
        assert kind is (QuickGELU if quick else nn.GELU)
        heads, eps = only(block.attn.num_heads for block in blocks), only(block.ln_1.eps for block in blocks)
        assert facts(found) == expected(heads, "quick_gelu" if quick else "gelu", eps)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "hpsv2.1"])
def test_the_three_on_vit_h_are_alike(name: str) -> None:
    """PickScore_v1/config.json: 16 heads each, gelu, 1e-5."""
    network = on_meta(name).clip
    for encoder in (network.vision_model, network.text_model):
        assert facts(encoder) == expected(16, "gelu", 1e-5)


def test_the_two_on_openai_s_vit_l_are_alike() -> None:
    """clip-vit-large-patch14/config.json: 16 and 12 heads, quick_gelu, 1e-5."""
    network = on_meta("clip").clip
    assert facts(network.vision_model) == expected(16, "quick_gelu", 1e-5)
    assert facts(network.text_model) == expected(12, "quick_gelu", 1e-5)
    assert facts(on_meta("aesthetic").clip.vision_model) == expected(16, "quick_gelu", 1e-5)


def test_image_reward_is_blip_with_the_large_vit() -> None:
    """BLIP's create_vit("large"): 16 heads, GELU, 1e-6; its med_config.json: 12 heads, gelu, 1e-12."""
    network = on_meta("imagereward")
    assert facts(network.vision) == expected(16, "gelu", 1e-6)
    assert facts(network.text) == expected(12, "gelu", 1e-12)
    assert not any(module.p for module in network.modules() if isinstance(module, nn.Dropout))


def test_siglip_is_so400m() -> None:
    """siglip-so400m-patch14-384/config.json: 16 heads, gelu_pytorch_tanh, 1e-6; also where it pools."""
    assert facts(on_meta("siglip-aesthetic").vision_model) == expected(16, "gelu_pytorch_tanh", 1e-6)


def test_the_detector_is_mask2former_with_a_small_swin() -> None:
    """mask2former-swin-small-coco-instance/config.json, and Mask2Former's own: 8 heads and ReLU."""
    with torch.device("meta"):
        network: Any = detector.network(detector.SWIN_SMALL)
    swin, whole = network.config.backbone_config, network.config
    assert (swin.num_heads, swin.depths, swin.window_size) == ([3, 6, 12, 24], [2, 2, 18, 2], 7)
    assert (swin.patch_size, swin.mlp_ratio, swin.qkv_bias) == (4, 4.0, True)
    assert (swin.hidden_act, swin.layer_norm_eps) == ("gelu", 1e-5)
    assert (whole.num_attention_heads, whole.activation_function, whole.pre_norm) == (8, "relu", False)
    assert (whole.encoder_layers, whole.decoder_layers) == (6, 10)
    assert list(whole.feature_strides) == [4, 8, 16, 32]
    assert only(m.eps for m in network.modules() if isinstance(m, nn.LayerNorm)) == 1e-5
