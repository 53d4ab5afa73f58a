"""Every reward against an independent path: official preprocessing with Pillow, and the official network.

| reward | network of the reference |
|---|---|
| HPS v2.0, v2.1 | open_clip's own model, which the official package vendors |
| PickScore, CLIP score, LAION aesthetic | transformers' own model, as the model cards use it |
| SigLIP aesthetic v2.5 | transformers' own model with the official head |
| ImageReward | BLIP written out here over the published tensors; its package imports no longer |

Weights are random, at reduced width; true sizes are checked by name and shape on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from hyperalign.rewards import Reward, aesthetic, clip, hpsv2, image_reward, loading, siglip_aesthetic
from hyperalign.rewards.images import CLIP_MEAN, CLIP_STD

State = dict[str, Tensor]
Pixels = NDArray[np.uint8]
Network = Callable[[Tensor, str], float]
"""Preprocessed pixels (3, H, W) and a prompt -> the official score."""

PREPROCESS = dict.fromkeys(("pickscore", "clip", "aesthetic", "imagereward"), clip.preprocess) | {
    "hpsv2": hpsv2.preprocess,
    "hpsv2.1": hpsv2.preprocess,
    "siglip-aesthetic": siglip_aesthetic.preprocess,
}
REAL_HEAD = Path(__file__).resolve().parents[4] / "shared/data/aesthetic/sac+logos+ava1-l14-linearMSE.pth"
PROMPTS = ("a photograph of a cat, two red coffee", "the moon")


def normalised(image: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def official_clip_pixels(image: Pixels) -> Tensor:
    """OpenAI's: shortest side to 224, bicubic on bytes, centre crop."""
    image = Image.fromarray(image)
    width, height = image.size
    short = min(width, height)
    size = (int(224 * width / short), int(224 * height / short))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    return normalised(np.asarray(image.crop((left, top, left + 224, top + 224))), CLIP_MEAN, CLIP_STD)


def official_hps_pixels(image: Pixels) -> Tensor:
    """HPS's: longest side to 224, black around."""
    image = Image.fromarray(image)
    scale = 224 / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    canvas = Image.new("RGB", (224, 224))
    corner = ((224 - size[0]) // 2, (224 - size[1]) // 2)
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
    return normalised(np.asarray(canvas), CLIP_MEAN, CLIP_STD)


def official_siglip_pixels(image: Pixels) -> Tensor:
    """SigLIP's: both sides to 384, in [-1, 1]."""
    image = Image.fromarray(image).resize((384, 384), Image.Resampling.BICUBIC)
    return normalised(np.asarray(image), (0.5,) * 3, (0.5,) * 3)


OFFICIAL_PIXELS = dict.fromkeys(PREPROCESS, official_clip_pixels) | {
    "hpsv2": official_hps_pixels,
    "hpsv2.1": official_hps_pixels,
    "siglip-aesthetic": official_siglip_pixels,
}


def hps_network(path: Path, official: ModuleType) -> Network:
    model = official.open_clip_model(official.SMALL_H)
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    tokenize = open_clip.get_tokenizer("ViT-H-14")

    def score(pixels: Tensor, prompt: str) -> float:
        image, text, _ = model(pixels[None], tokenize([prompt]))
        return float(image @ text.T)

    return score


def transformers_network(path: Path, model: Any, vocabularies: Path, scaled: bool) -> Network:
    from transformers import CLIPTokenizer

    model.load_state_dict({k: v for k, v in load_file(path).items() if not k.endswith("position_ids")})
    tokenizer: Any = CLIPTokenizer.from_pretrained(str(vocabularies))

    def score(pixels: Tensor, prompt: str) -> float:
        tokens = tokenizer([prompt], padding=True, truncation=True, max_length=77, return_tensors="pt")
        logits = model(pixel_values=pixels[None], **tokens).logits_per_image
        return float(logits if scaled else logits / model.logit_scale.exp())

    return score


def head_network(head: State, embed: Callable[[Tensor], Tensor]) -> Network:
    """Linear layers one after the other, on the embedding divided by its length."""
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in head))

    def score(pixels: Tensor, _: str) -> float:
        x = embed(pixels[None])
        x = x / x.norm(dim=-1, keepdim=True)
        for name in names:
            x = x @ head[f"{name}.weight"].T + head[f"{name}.bias"]
        return float(x)

    return score


def blip_network(state: State, official: ModuleType, vocabularies: Path) -> Network:
    """ImageReward written out: a pre-norm ViT, a post-norm BERT with cross-attention, a linear head."""
    from tokenizers import BertWordPieceTokenizer

    shape = official.SMALL_BLIP
    words = BertWordPieceTokenizer(str(vocabularies / "vocab.txt"), lowercase=True)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def encode_image(pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        proj = f"{name}.patch_embed.proj"
        patches = F.conv2d(pixels[None], state[f"{proj}.weight"], state[f"{proj}.bias"], shape.patch)
        tokens = torch.cat([state[f"{name}.cls_token"][0], patches[0].flatten(1).T])
        x = tokens + state[f"{name}.pos_embed"][0]
        for i in range(shape.vision.layers):
            block = f"{name}.blocks.{i}"
            q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + linear(f"{block}.attn.proj", attend(q, k, v, shape.vision.heads))
            hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))
            x = x + linear(f"{block}.mlp.fc2", F.gelu(hidden))
        return norm(f"{name}.norm", x, 1e-6)

    def encode(tokens: list[int], image: Tensor) -> Tensor:
        name = "blip.text_encoder"
        embeddings = f"{name}.embeddings"
        x = state[f"{embeddings}.word_embeddings.weight"][tokens]
        x = x + state[f"{embeddings}.position_embeddings.weight"][: len(tokens)]
        x = norm(f"{embeddings}.LayerNorm", x, 1e-12)
        for i in range(shape.text.layers):
            layer = f"{name}.encoder.layer.{i}"
            for kind in ("attention", "crossattention"):
                source = x if kind == "attention" else image
                q, k, v = (linear(f"{layer}.{kind}.self.{part}", t)
                           for part, t in (("query", x), ("key", source), ("value", source)))  # fmt: skip
                out = linear(f"{layer}.{kind}.output.dense", attend(q, k, v, shape.text.heads))
                x = norm(f"{layer}.{kind}.output.LayerNorm", x + out, 1e-12)
            out = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", x)))
            x = norm(f"{layer}.output.LayerNorm", x + out, 1e-12)
        return x

    def score(pixels: Tensor, prompt: str) -> float:
        tokens = words.encode(prompt).ids  # unpadded: tokens after [SEP] are masked
        x = encode(tokens, encode_image(pixels))[0]
        for place in (0, 2, 4, 6, 7):
            x = linear(f"mlp.layers.{place}", x)
        return (float(x) - 0.16717362830052426) / 1.0333394966054072

    return score


def reference(name: str, folder: Path, official: ModuleType, vocabularies: Path) -> Network:
    match name:
        case "hpsv2" | "hpsv2.1":
            file = hpsv2.V2_0 if name == "hpsv2" else hpsv2.V2_1
            return hps_network(folder / file.path, official)
        case "pickscore" | "clip":
            model = official.transformers_clip(official.SMALL_H if name == "pickscore" else official.SMALL_L)
            path = folder / loading.PUBLISHED[name].files[0].path
            return transformers_network(path, model, vocabularies, scaled=name == "pickscore")
        case "aesthetic":
            model = official.transformers_clip(official.SMALL_L)
            transformers_network(folder / aesthetic.ENCODER.path, model, vocabularies, scaled=False)
            head = torch.load(folder / aesthetic.HEAD.path, weights_only=True)
            return head_network(
                head, lambda pixels: model.visual_projection(model.vision_model(pixels).pooler_output)
            )
        case "siglip-aesthetic":
            model = official.transformers_siglip(official.SMALL_SIGLIP)
            model.load_state_dict(load_file(folder / siglip_aesthetic.ENCODER.path))
            head = torch.load(folder / siglip_aesthetic.HEAD.path, weights_only=True)
            return head_network(head, lambda pixels: model.vision_model(pixels).pooler_output)
        case _:
            state = torch.load(folder / image_reward.WEIGHTS.path, weights_only=True)
            return blip_network(state, official, vocabularies)


def batch_of(image: Pixels) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(params=loading.PUBLISHED)
def paths(
    request: pytest.FixtureRequest, published: Callable[[str], Path], official: ModuleType, vocabularies: Path
) -> tuple[str, Reward, Network]:
    """A reward's name, the reward, and the official network with the same weights."""
    name = request.param
    folder = published(name)
    network = reference(name, folder, official, vocabularies)
    return name, loading.load(name, folder), network


@torch.no_grad()
def test_on_equal_pixels_the_network_is_the_official_one(
    paths: tuple[str, Reward, Network], images: list[Pixels]
) -> None:
    name, reward, network = paths
    for image in images[:4]:
        pixels = PREPROCESS[name](batch_of(image))[0]
        for prompt in PROMPTS:
            score = float(reward.score(batch_of(image), [prompt]))
            assert score == pytest.approx(network(pixels, prompt), rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_end_to_end_it_is_within_one_per_cent_of_the_official_path(
    paths: tuple[str, Reward, Network], images: list[Pixels]
) -> None:
    """Of the score, or of the spread of scores where one passes through zero."""
    name, reward, network = paths
    ours = torch.cat([reward.score(batch_of(image), [PROMPTS[0]]) for image in images])
    theirs = torch.tensor([network(OFFICIAL_PIXELS[name](image), PROMPTS[0]) for image in images])
    allowed = 0.01 * theirs.abs().clamp(min=float(theirs.std()))
    assert bool(((ours - theirs).abs() <= allowed).all())
    assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.999


@torch.no_grad()
def test_a_batch_scores_as_its_images_alone(paths: tuple[str, Reward, Network]) -> None:
    _, reward, _ = paths
    images = torch.rand(3, 3, 50, 70)
    prompts = ["a cat", "the moon", "a cat"]
    alone = [float(reward.score(images[i : i + 1], prompts[i : i + 1])) for i in range(3)]
    assert reward.score(images, prompts).tolist() == pytest.approx(alone, rel=1e-4, abs=1e-5)


@torch.no_grad()
@pytest.mark.skipif(not REAL_HEAD.is_file(), reason="the real head is not in ../shared/data")
def test_the_real_aesthetic_head_is_read(published: Callable[[str], Path], official: ModuleType) -> None:
    folder = published("aesthetic")
    (folder / aesthetic.HEAD.path).write_bytes(REAL_HEAD.read_bytes())
    reward = loading.load("aesthetic", folder)
    head = torch.load(REAL_HEAD, map_location="cpu", weights_only=True)
    images = torch.rand(2, 3, 60, 80)
    embeddings = reward.embed_images(images)
    network = head_network(head, lambda embedding: embedding)
    expected = [network(embedding, "") for embedding in embeddings]
    assert reward.score(images, ["", ""]).tolist() == pytest.approx(expected, rel=1e-4)
