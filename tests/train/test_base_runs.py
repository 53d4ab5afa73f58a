"""Base models from folders, as people have them: encode images, check, train, resume, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from hyperalign import checkpoint
from hyperalign.hosts.diffusers.adapter import spec_of
from hyperalign.image_sets import open_image_set
from train import analyse, encode, generate
from train.config import BaseName
from train.models.architectures import ModelSize, architecture, with_random_weights
from train.train import main

FAMILIES: tuple[BaseName, ...] = ("sd15", "sdxl", "flux", "sd3")
SHAPES = {
    "sd15": ModelSize(width_divisor=10),
    "sdxl": ModelSize(width_divisor=10),
    "flux": ModelSize(double_blocks=3, single_blocks=2, width_divisor=12),
    "sd3": ModelSize(double_blocks=4, width_divisor=12),
}
COLORS = ("red", "blue", "green", "yellow")


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Returns a tokenizer that spells."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, model_max_length=77, pad_token="<|endoftext|>")


def clip(width: int, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5() -> tuple[Any, Any]:
    letters = [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0), *letters]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    encoder = T5EncoderModel(
        T5Config(vocab_size=32, d_model=4096, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    return encoder, tokenizer


def autoencoder(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels,
    )  # fmt: skip


def pipeline(name: BaseName, folder: Path) -> Any:
    torch.manual_seed(0)
    with torch.device("meta"):
        backbone = architecture(name, SHAPES[name])
    backbone = with_random_weights(backbone, torch.device("cpu"), torch.float32)
    tokenizer = clip_tokenizer(folder / "clip")
    ddim, flow = DDIMScheduler(), FlowMatchEulerDiscreteScheduler()
    if name == "sd15":
        return StableDiffusionPipeline(
            vae=autoencoder(4), text_encoder=clip(768), tokenizer=tokenizer, unet=backbone, scheduler=ddim,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    if name == "sdxl":
        return StableDiffusionXLPipeline(
            vae=autoencoder(4), text_encoder=clip(768), text_encoder_2=clip(1280, True), tokenizer=tokenizer,
            tokenizer_2=tokenizer, unet=backbone, scheduler=ddim,
        )  # fmt: skip
    t5_encoder, t5_tokenizer = t5()
    if name == "flux":
        return FluxPipeline(
            vae=autoencoder(16), text_encoder=clip(768), tokenizer=tokenizer, text_encoder_2=t5_encoder,
            tokenizer_2=t5_tokenizer, transformer=backbone, scheduler=flow,
        )  # fmt: skip
    return StableDiffusion3Pipeline(
        vae=autoencoder(16), text_encoder=clip(768, True), tokenizer=tokenizer,
        text_encoder_2=clip(1280, True), tokenizer_2=tokenizer, text_encoder_3=t5_encoder,
        tokenizer_3=t5_tokenizer, transformer=backbone, scheduler=flow,
    )  # fmt: skip


def recipe(name: BaseName, folder: Path) -> Path:
    """Writes a recipe with everything that it names, and returns it."""
    pipeline(name, folder).save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("".join(f"a {color} circle\n" for color in COLORS))
    (folder / "validation.txt").write_text("a purple circle\na brown square\n")
    (folder / "images").mkdir()
    for index in range(6):
        image = Image.new("RGB", (80, 64), "white")
        ImageDraw.Draw(image).ellipse([20, 10, 60, 50], fill=COLORS[index % 4])
        image.save(folder / "images" / f"{index}.png")
        (folder / "images" / f"{index}.txt").write_text(f"a {COLORS[index % 4]} square")
    text = f"""
[model]
base = "{name}"
path = "{folder.as_posix()}/model"
resolution = 64
perception_blocks = 2
[network]
width = 32
layers = 1
[objective]
rewards = {{ "tiny reward" = 1.0 }}
prompt_batch = 2
rollout_steps = 2
timesteps = 1
preference_batch = 2
[optim]
steps = 2
bf16 = false
[data]
prompts = "{folder.as_posix()}/prompts.txt"
preference = "{folder.as_posix()}/shards"
preference_name = "circles called squares, CC0"
embeddings = "{folder.as_posix()}/embeddings"
text_lengths = [24, 32]
[validation]
prompts = "{folder.as_posix()}/validation.txt"
every = 2
steps = 2
rewards = {{ "tiny validation reward" = 1.0 }}
[run]
out = "{folder.as_posix()}/run"
"""
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_becomes_a_hypernetwork(
    name: BaseName, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(name, tmp_path)
    assert main(["--recipe", str(path)]) == 2
    assert "Make them with train/encode.py" in capsys.readouterr().err
    source, shards = str(tmp_path / "images"), str(tmp_path / "shards")
    assert encode.main(["--recipe", str(path), "--source", source, "--out", shards]) == 0
    assert main(["--recipe", str(path), "--check"]) == 2
    # Nothing else is wrong; the true rewards are too large for a test.
    assert "cannot start, 2 problems" in capsys.readouterr().err
    assert main(["--recipe", str(path)]) == 0, capsys.readouterr().err
    made = checkpoint.load(tmp_path / "run" / "hypernetwork.safetensors")
    assert made.header.family == name
    assert made.header.training["preference_data"] == "circles called squares, CC0"
    assert str(tmp_path) not in json.dumps(made.header.training)
    assert made.header.training["metrics"].keys() >= {"tiny reward", "tiny validation reward", "diversity"}
    assert made.header.sources[-1].name == "circles called squares, CC0"
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    validation = json.loads(lines[-1])["validation"]
    assert {"tiny reward", "tiny validation reward", "diversity"} <= validation.keys()
    embeddings = sorted((tmp_path / "embeddings").rglob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in embeddings]
    (tmp_path / "run" / "checkpoints" / "step-000002.pt").unlink()
    assert main(["--recipe", str(path)]) == 0
    assert [file.stat().st_mtime_ns for file in embeddings] == before
    assert (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").count("\n") == 2
    analyse_it(tmp_path, path)


def analyse_it(folder: Path, path: Path) -> None:
    """Analyses the hypernetwork over prompts that its training has encoded."""
    named = [
        "--recipe",
        str(path),
        "--prompts",
        str(folder / "prompts.txt"),
        "--out",
        str(folder / "figures"),
    ]
    file = str(folder / "run" / "hypernetwork.safetensors")
    assert analyse.main(["weights", "--hypernetwork", file, "--steps", "2", *named]) == 0
    few = ["--steps", "2", "--seeds", "2", "--count", "3"]
    assert analyse.main(["diversity", "--hypernetworks", file, *few, *named]) == 0
    shares = json.loads((folder / "figures" / "division.json").read_text(encoding="utf-8"))["shares"]
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-4)
    report = json.loads((folder / "figures" / "diversity.json").read_text(encoding="utf-8"))
    assert report["encoder"] == "tiny validation reward"


def random_lora(backbone: Any, path: Path) -> None:
    """Writes a LoRA of every attention projection under the names of its family."""
    spec, tensors = spec_of(backbone), {}
    for target in spec.targets("separate"):
        down, up, alpha = spec.lora_names.keys(target.name)
        tensors |= {} if alpha is None else {alpha: torch.tensor(2.0)}
        tensors |= {down: torch.randn(2, target.in_features), up: torch.randn(target.out_features, 2)}
    save_file(tensors, path)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_folder_draws_a_prompt_list(name: BaseName, tmp_path: Path) -> None:
    """Alone, with a LoRA, and as it is without a recipe; a fine-tuned backbone is the base's own here."""
    path = recipe(name, tmp_path)
    parts = pipeline(name, tmp_path).components
    random_lora(parts["unet" if name == "sd15" else "transformer"], tmp_path / "lora.safetensors")

    def drawn(folder: str, *more: str) -> list[bytes]:
        out, prompts = tmp_path / folder, tmp_path / "validation.txt"
        arguments = ["--prompts", str(prompts), "--out", str(out), "--images-per-prompt", "1", "--steps", "2"]
        assert generate.main([*arguments, *more]) == 0
        return [Image.open(row[0]).tobytes() for row in open_image_set(out).images]

    ours = ("--recipe", str(path))
    base = drawn("base", *ours)
    assert base[0] != base[1]
    assert drawn("lora", *ours, "--lora", str(tmp_path / "lora.safetensors")) != base
    assert drawn("tuned", *ours, "--fine-tuned", str(tmp_path / "model")) == base
    alone = ("--model", str(tmp_path / "model"), "--resolution", "64", "--text-length", "32")
    assert drawn("alone", *alone, "--cfg", "4", "--precision", "float32") == base
