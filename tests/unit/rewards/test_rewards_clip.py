"""CLIP's preprocessing and score, its shapes and its two file layouts, spelt out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hyperalign.errors import HyperAlignError
from hyperalign.rewards import clip
from hyperalign.rewards.clip import ClipNetwork, ClipReward, ClipShape, Tower
from hyperalign.rewards.images import crop_to_square

PUBLISHED = clip.VIT_H_14, clip.VIT_L_14  # at import: tests of whole rewards make them smaller
SHAPE = ClipShape(Tower(16, 1, 2), Tower(8, 1, 2), 12, "gelu", side=8, patch=4, vocabulary=9)


@pytest.fixture(scope="module")
def network() -> ClipNetwork:
    torch.manual_seed(0)
    return ClipNetwork(SHAPE).eval().requires_grad_(False)


def tokenize(prompts) -> Tensor:
    """Start, a token of the length, the end, which is the greatest, and padding."""
    return torch.tensor([[1, 2 + len(prompt) % 4, 8, 0] for prompt in prompts])


def halved(images: Tensor) -> Tensor:
    return images[..., :8, :8] / 2


def test_clip_reads_the_centre_of_224_pixels_normalised() -> None:
    image = torch.rand(2, 3, 30, 40)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = (crop_to_square(image, 224).movedim(1, -1) - mean) / deviation
    torch.testing.assert_close(clip.preprocess(image).movedim(1, -1), expected)


def test_the_sizes_are_told_in_transformers_words() -> None:
    assert SHAPE.vision_config() == {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "hidden_act": "gelu", "projection_dim": 12, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    assert SHAPE.text_config() == {
        "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "hidden_act": "gelu", "projection_dim": 12, "vocab_size": 9, "max_position_embeddings": 77,
        "eos_token_id": 2,
    }  # fmt: skip


def test_the_published_sizes() -> None:
    h, l = PUBLISHED  # noqa: E741
    assert (h.vision, h.text) == (Tower(1280, 32, 16), Tower(1024, 24, 16))
    assert (l.vision, l.text) == (Tower(1024, 24, 16), Tower(768, 12, 12))
    assert [(s.embedding, s.activation) for s in (h, l)] == [(1024, "gelu"), (768, "quick_gelu")]
    assert [(s.side, s.patch, s.vocabulary) for s in (h, l)] == [(224, 14, 49408)] * 2


def test_embeddings_are_unit_vectors_of_the_projected_pools(network: ClipNetwork) -> None:
    pixels = torch.randn(2, 3, 8, 8)
    pooled = network.clip.vision_model(pixel_values=pixels).pooler_output
    wanted = pooled @ network.clip.visual_projection.weight.T
    expected = wanted / wanted.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(network.embed_images(pixels), expected)
    hidden = network.clip.text_model(input_ids=tokenize(["a", "bb"])).last_hidden_state
    wanted = hidden[:, 2] @ network.clip.text_projection.weight.T  # at the end of the text
    torch.testing.assert_close(network.embed_texts(tokenize(["a", "bb"])), F.normalize(wanted, dim=1))


def test_a_score_is_the_cosine_and_scaled_if_asked_for(network: ClipNetwork) -> None:
    images, prompts = torch.rand(3, 3, 9, 9), ["a", "bb", "a"]
    cosines = [
        float(network.embed_images(halved(images[i : i + 1])) @ network.embed_texts(tokenize([prompt])).T)
        for i, prompt in enumerate(prompts)
    ]
    plain = ClipReward("plain", network, halved, tokenize)
    assert plain.score(images, prompts).tolist() == pytest.approx(cosines, abs=1e-5)
    scaled = ClipReward("scaled", network, halved, tokenize, scaled=True)
    factor = float(network.clip.logit_scale.exp())
    assert scaled.score(images, prompts).tolist() == pytest.approx([factor * c for c in cosines], abs=1e-4)
    torch.testing.assert_close(plain.embed_images(images), network.embed_images(halved(images)))


def test_half_precision_is_compared_in_single_precision_and_autocast_kept_out(network: ClipNetwork) -> None:
    reward = ClipReward("plain", network, halved, tokenize)
    images = torch.rand(1, 3, 8, 8)
    alone = reward.score(images, ["a"]), reward.embed_images(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ClipReward("again", network, halved, tokenize).score(images, ["a"]), alone[0])
        assert torch.equal(reward.embed_images(images), alone[1])
    half = ClipNetwork(SHAPE).bfloat16().requires_grad_(False)
    assert half.embed_images(torch.rand(1, 3, 8, 8).bfloat16()).dtype == torch.float32
    assert half.embed_texts(tokenize(["a"])).dtype == torch.float32


def test_each_reward_remembers_its_own_prompts(network: ClipNetwork) -> None:
    one, other = (ClipReward(name, network, halved, tokenize) for name in ("one", "other"))
    assert one._texts is not other._texts
    one.score(torch.rand(1, 3, 8, 8), ["a"])
    assert list(one._texts._features) == ["a"] and not other._texts._features


def test_what_is_no_image_or_no_text_is_refused(network: ClipNetwork) -> None:
    reward = ClipReward("plain", network, halved, tokenize)
    with pytest.raises(HyperAlignError, match="images of shape"):
        reward.score(torch.rand(3, 8, 8), ["a"] * 3)
    with pytest.raises(HyperAlignError, match="images of shape"):
        reward.embed_images(torch.rand(3, 8, 8))
    with pytest.raises(HyperAlignError, match="1 images and 2 prompts"):
        reward.score(torch.rand(1, 3, 8, 8), ["a", "b"])


def test_saved_positions_and_the_text_encoder_are_left_out() -> None:
    state = {name: torch.zeros(1) for name in (
        "vision_model.a", "vision_model.embeddings.position_ids", "text_model.a", "text_projection.weight",
        "visual_projection.weight", "logit_scale",
    )}  # fmt: skip
    assert list(clip.from_transformers(state)) == [
        "vision_model.a", "text_model.a", "text_projection.weight", "visual_projection.weight", "logit_scale"
    ]  # fmt: skip
    assert list(clip.vision_from_transformers(state)) == ["vision_model.a", "visual_projection.weight"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
        ("visual.ln_post.weight", "vision_model.post_layernorm.weight"),
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("ln_final.weight", "text_model.final_layer_norm.weight"),
        ("visual.transformer.resblocks.3.ln_1.weight", "vision_model.encoder.layers.3.layer_norm1.weight"),
        ("transformer.resblocks.11.ln_2.bias", "text_model.encoder.layers.11.layer_norm2.bias"),
        ("transformer.resblocks.0.mlp.c_fc.weight", "text_model.encoder.layers.0.mlp.fc1.weight"),
        ("transformer.resblocks.0.mlp.c_proj.bias", "text_model.encoder.layers.0.mlp.fc2.bias"),
        ("transformer.resblocks.0.attn.out_proj.bias", "text_model.encoder.layers.0.self_attn.out_proj.bias"),
        ("logit_scale", "logit_scale"),
    ],
)  # fmt: skip
def test_open_clip_s_names_become_transformers(theirs: str, ours: str) -> None:
    value = torch.rand(2, 3)
    (name,), (found,) = zip(*clip.from_open_clip({theirs: value}).items(), strict=True)
    assert (name, found is value) == (ours, True)


def test_open_clip_s_last_projections_are_turned_and_its_fused_ones_split() -> None:
    value = torch.rand(6, 3)
    names = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
    for theirs, ours in names.items():
        assert torch.equal(clip.from_open_clip({theirs: value})[ours], value.T)
    for kind in ("weight", "bias"):
        found = clip.from_open_clip({f"visual.transformer.resblocks.7.attn.in_proj_{kind}": value})
        assert list(found) == [
            f"vision_model.encoder.layers.7.self_attn.{part}_proj.{kind}" for part in "qkv"
        ]
        assert torch.equal(torch.cat(list(found.values())), value)
        assert [len(rows) for rows in found.values()] == [2, 2, 2]
