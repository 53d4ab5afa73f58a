"""Published weight files of reduced size, in their official layout, and many kinds of images."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import open_clip
import pytest
import skimage.data
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperalign.rewards import aesthetic, clip, image_reward, siglip_aesthetic
from hyperalign.rewards.clip import ClipShape, Tower
from hyperalign.rewards.image_reward import BlipShape
from hyperalign.rewards.siglip_aesthetic import SiglipShape
from train.tiny import art

State = dict[str, Tensor]
Pixels = NDArray[np.uint8]

SMALL_H = ClipShape(Tower(64, 2, 4), Tower(48, 2, 4), 32, "gelu", patch=32)
SMALL_L = ClipShape(Tower(64, 2, 4), Tower(48, 2, 4), 768, "quick_gelu", patch=32)
SMALL_BLIP = BlipShape(Tower(64, 2, 4), Tower(48, 2, 4), patch=32)
SMALL_SIGLIP = SiglipShape(width=48, intermediate=80, layers=2, heads=4, patch=48)

ART = Path(__file__).parents[3] / "build" / "tiny" / "art"
EMOJI = {"dog-face": 300, "automobile": 64, "red-apple": 517, "evergreen-tree": 32}
"""Icons, and the sides at which they are rendered."""
WORDS = ("a", "photograph", "of", "cat", "coffee", "rocket", "two", "red", "the", "moon", ",", "emoji")


@pytest.fixture(autouse=True)
def small_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code at widths that a test can afford."""
    torch.manual_seed(0)
    monkeypatch.setattr(clip, "VIT_H_14", SMALL_H)
    monkeypatch.setattr(clip, "VIT_L_14", SMALL_L)
    monkeypatch.setattr(image_reward, "BLIP_LARGE", SMALL_BLIP)
    monkeypatch.setattr(siglip_aesthetic, "SO400M", SMALL_SIGLIP)


@pytest.fixture(scope="session")
def official() -> ModuleType:
    """This file's builders of official models."""
    return sys.modules[__name__]


def open_clip_model(shape: ClipShape) -> CLIP:
    """open_clip's own model: the official HPS v2 is this."""
    tower = shape.vision
    vision = CLIPVisionCfg(
        layers=tower.layers, width=tower.width, head_width=tower.width // tower.heads,
        patch_size=shape.patch, image_size=shape.side,
    )  # fmt: skip
    text = CLIPTextCfg(width=shape.text.width, heads=shape.text.heads, layers=shape.text.layers)
    return CLIP(shape.embedding, vision, text, quick_gelu=shape.activation == "quick_gelu").eval()


def transformers_clip(shape: ClipShape) -> Any:
    """transformers' own model, with its own configuration."""
    from transformers import CLIPConfig, CLIPModel

    towers = {
        name: {
            "hidden_size": tower.width, "intermediate_size": 4 * tower.width,
            "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads,
            "hidden_act": shape.activation, "projection_dim": shape.embedding,
        }
        for name, tower in (("text_config", shape.text), ("vision_config", shape.vision))
    }  # fmt: skip
    towers["vision_config"] |= {"patch_size": shape.patch, "image_size": shape.side}
    return CLIPModel(CLIPConfig(**towers, projection_dim=shape.embedding)).eval()


def image_reward_shapes(shape: BlipShape) -> dict[str, tuple[int, ...]]:
    """The tensors of ImageReward.pt, as its published modules name them."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, wide_in: int, wide_out: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (wide_out, wide_in), (wide_out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    wide, narrow = shape.vision.width, shape.text.width
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    shapes[f"{vision}.cls_token"] = (1, 1, wide)
    shapes[f"{vision}.pos_embed"] = (1, (shape.side // shape.patch) ** 2 + 1, wide)
    shapes[f"{vision}.patch_embed.proj.weight"] = (wide, 3, shape.patch, shape.patch)
    shapes[f"{vision}.patch_embed.proj.bias"] = (wide,)
    for i in range(shape.vision.layers):
        block = f"{vision}.blocks.{i}"
        norm(f"{block}.norm1", wide)
        linear(f"{block}.attn.qkv", wide, 3 * wide)
        linear(f"{block}.attn.proj", wide, wide)
        norm(f"{block}.norm2", wide)
        linear(f"{block}.mlp.fc1", wide, 4 * wide)
        linear(f"{block}.mlp.fc2", 4 * wide, wide)
    norm(f"{vision}.norm", wide)
    shapes[f"{text}.embeddings.position_ids"] = (1, 512)
    shapes[f"{text}.embeddings.word_embeddings.weight"] = (shape.vocabulary, narrow)
    shapes[f"{text}.embeddings.position_embeddings.weight"] = (512, narrow)
    norm(f"{text}.embeddings.LayerNorm", narrow)
    for i in range(shape.text.layers):
        layer = f"{text}.encoder.layer.{i}"
        for kind, width in (("attention", narrow), ("crossattention", wide)):
            linear(f"{layer}.{kind}.self.query", narrow, narrow)
            linear(f"{layer}.{kind}.self.key", width, narrow)
            linear(f"{layer}.{kind}.self.value", width, narrow)
            linear(f"{layer}.{kind}.output.dense", narrow, narrow)
            norm(f"{layer}.{kind}.output.LayerNorm", narrow)
        linear(f"{layer}.intermediate.dense", narrow, 4 * narrow)
        linear(f"{layer}.output.dense", 4 * narrow, narrow)
        norm(f"{layer}.output.LayerNorm", narrow)
    linear("blip.vision_proj", wide, 256)
    linear("blip.text_proj", narrow, 256)
    for place, wide_in, wide_out in zip(
        (0, 2, 4, 6, 7), (narrow, 1024, 128, 64, 16), (1024, 128, 64, 16, 1), strict=True
    ):
        linear(f"mlp.layers.{place}", wide_in, wide_out)
    return shapes


def _random(shapes: dict[str, tuple[int, ...]]) -> State:
    state: State = {}
    for key, shape in shapes.items():
        if key.endswith("position_ids"):
            state[key] = torch.arange(shape[-1]).expand(shape).clone()
        elif "norm" in key.lower():
            state[key] = torch.randn(shape) * 0.1 + (1.0 if key.endswith("weight") else 0.0)
        else:
            state[key] = torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.05)
    return state


def _head(width: int, places: tuple[int, ...], prefix: str) -> State:
    sizes = (width, 1024, 128, 64, 16, 1)
    layers = nn.ModuleDict(
        {str(p): nn.Linear(i, o) for p, i, o in zip(places, sizes, sizes[1:], strict=False)}
    )
    return {f"{prefix}.{key}": value.detach() for key, value in layers.state_dict().items()}


def transformers_siglip(shape: SiglipShape) -> Any:
    """transformers' own model, with a text encoder that is not used."""
    from transformers import SiglipConfig, SiglipModel

    text = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4,
        "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": shape.width, "intermediate_size": shape.intermediate, "image_size": shape.side,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "patch_size": shape.patch,
    }  # fmt: skip
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()  # type: ignore[arg-type]


def _write(name: str, folder: Path) -> None:
    """Writes the files of one reward as they are published."""
    torch.manual_seed(1)
    match name:
        case "hpsv2" | "hpsv2.1":
            state = {"state_dict": open_clip_model(SMALL_H).state_dict(), "epoch": 3}
            torch.save(
                state, folder / ("HPS_v2_compressed.pt" if name == "hpsv2" else "HPS_v2.1_compressed.pt")
            )
        case "pickscore":
            _save(transformers_clip(SMALL_H).state_dict(), folder / "PickScore_v1/model.safetensors")
        case "clip" | "aesthetic":
            state = transformers_clip(SMALL_L).state_dict()
            state["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
            _save(state, folder / "clip-vit-large-patch14/model.safetensors")
            torch.save(_head(768, (0, 2, 4, 6, 7), "layers"), folder / aesthetic.HEAD.path)
        case "imagereward":
            torch.save(_random(image_reward_shapes(SMALL_BLIP)), folder / "ImageReward.pt")
        case _:
            path = folder / "siglip-so400m-patch14-384/model.safetensors"
            _save(transformers_siglip(SMALL_SIGLIP).state_dict(), path)
            head = _head(SMALL_SIGLIP.width, (0, 2, 4, 6, 8), "scoring_head")
            torch.save(head, folder / "aesthetic_predictor_v2_5.pth")


def _save(state: State, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, path)


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CLIP's vocabulary, as open_clip ships it, and a small one of BERT's kind."""
    folder = tmp_path_factory.mktemp("tokenizer")
    simple = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): index for word, index in simple.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in simple.bpe_ranks)])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    unused = [f"[unused{i}]" for i in range(99)]
    words = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "pa", "##per"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def published(tmp_path: Path, vocabularies: Path) -> Callable[[str], Path]:
    """Writes the files of one reward, and the tokenizer, into a folder."""

    def write(name: str) -> Path:
        folder = tmp_path / "hyperalign_rewards"
        folder.mkdir(exist_ok=True)
        if not (folder / "tokenizer").exists():
            (folder / "tokenizer").symlink_to(vocabularies)
        _write(name, folder)
        return folder

    return write


def _scikit_images() -> Iterator[Pixels]:
    data = Path(skimage.data.__file__).parent
    for name in sorted(path.name for path in data.iterdir() if path.suffix in (".png", ".jpg")):
        with Image.open(data / name) as image:
            yield np.asarray(image.convert("RGB"))


def _clip_art(seed: int) -> Pixels:
    """Flat shapes with hard edges on white."""
    generator = np.random.default_rng(seed)
    width, height = (int(side) for side in generator.integers(60, 500, 2))
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, wide, high = generator.random(4) * (width, height, width / 2, height / 2)
        color = tuple(int(value) for value in generator.integers(0, 256, 3))
        shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
        shape((x, y, x + wide, y + high), fill=color)
    return np.asarray(image)


def _emoji(style: art.Style, name: str, size: int) -> Pixels:
    """A rendered emoji on white."""
    sprite = art.render_svg(art.svg_of(art.download_icons(style, ART), name), size)
    color, alpha = sprite[..., :3], sprite[..., 3:]
    return np.round(255 * (color * alpha + 1 - alpha)).astype(np.uint8)


@pytest.fixture(scope="session")
def images() -> list[Pixels]:
    """At least 50: photographs, microscopy, text, textures, drawings, emoji; square, wide, high, small."""
    whole = [image for image in _scikit_images() if max(image.shape) <= 1500]
    wide = [image[image.shape[0] // 3 : image.shape[0] // 2] for image in whole]
    emoji = [_emoji(style, name, size) for style in art.STYLES for name, size in EMOJI.items()]
    found = [*whole, *wide, *(_clip_art(seed) for seed in range(12)), *emoji]
    assert len(found) >= 50
    return found
