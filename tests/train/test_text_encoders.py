"""Text encoders from folders: fingerprints, damaged files, and which process embeds which prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hyperalign.errors import HyperAlignError
from train.config import BaseName, DataConfig, ModelConfig, OptimConfig, TrainConfig
from train.data.embeddings import CachedPromptEncoder, EmbeddingCache
from train.data.random_inputs import TEXT_WIDTHS, RandomPromptEncoder
from train.inputs import cached_encoder
from train.models.text_encoders import (
    check_cache_limit,
    context_tokens,
    load_text_encoders,
    text_bytes,
    text_fingerprint,
    text_lengths,
)

CPU = torch.device("cpu")
PROMPTS = [f"a {'x' * index}" for index in range(6)]
PARTS = {
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}


def clip() -> Any:
    """Returns a text encoder for the letters a and x."""
    config = CLIPTextConfig(
        vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=4, eos_token_id=5, pad_token_id=5,
    )  # fmt: skip
    return CLIPTextModel(config)


def write_tokenizer(folder: Path) -> None:
    words = ["a", "x", "a</w>", "x</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    CLIPTokenizer(*files, model_max_length=77, pad_token="<|endoftext|>").save_pretrained(folder)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """SD 1.5 with small text encoders and without the other weights."""
    folder = tmp_path / "model"
    for part in ("unet", "vae"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}", encoding="utf-8")
    torch.manual_seed(0)
    clip().save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    DDIMScheduler(steps_offset=1, clip_sample=False).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index | PARTS), encoding="utf-8")
    return TrainConfig(
        model=ModelConfig(base="sd15", path=folder),
        data=DataConfig(embeddings=tmp_path / "embeddings"),
        optim=OptimConfig(bf16=False),
    )


def weights(config: TrainConfig) -> Path:
    return config.model.path / "text_encoder" / "model.safetensors"


def test_a_fine_tune_with_files_of_the_same_size_has_another_fingerprint(config: TrainConfig) -> None:
    before, size = text_fingerprint(config), weights(config).stat().st_size
    assert text_fingerprint(config) == before
    torch.manual_seed(1)
    clip().save_pretrained(config.model.path / "text_encoder")
    assert weights(config).stat().st_size == size
    assert text_fingerprint(config) != before


@pytest.mark.parametrize("layer", range(12))
def test_one_layer_of_a_large_file_of_weights_changes_the_fingerprint(
    config: TrainConfig, layer: int
) -> None:
    large, each = config.model.path / "text_encoder" / "pytorch_model.bin", 200_000
    large.write_bytes(b"\0" * 12 * each)
    before = text_fingerprint(config)
    with large.open("r+b") as file:
        file.seek(layer * each)
        file.write(b"\1" * each)
    assert text_fingerprint(config) != before


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "text_encoder/config.json"])
def test_a_letter_of_a_tokenizer_or_configuration_changes_the_fingerprint(
    config: TrainConfig, name: str
) -> None:
    before, path = text_fingerprint(config), config.model.path / name
    text = path.read_bytes()
    path.write_bytes(text[:-20] + bytes([text[-20] ^ 1]) + text[-19:])
    assert text_fingerprint(config) != before


def test_embeddings_of_another_precision_are_others(config: TrainConfig) -> None:
    halved = dataclasses.replace(config, optim=OptimConfig(bf16=True))
    assert text_fingerprint(halved) != text_fingerprint(config)


def without_encoder(folder: Path) -> None:
    for path in (folder / "text_encoder").iterdir():
        path.unlink()
    (folder / "text_encoder").rmdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing encoder": without_encoder,
    "half an encoder": lambda folder: (folder / "text_encoder" / "model.safetensors").write_bytes(b"half"),
    "no index": lambda folder: (folder / "model_index.json").unlink(),
    "half a configuration": lambda folder: (folder / "text_encoder" / "config.json").write_text("{"),
    "half a tokenizer": lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_text_encoders_that_cannot_be_read_are_one_sentence(config: TrainConfig, what: str) -> None:
    DAMAGE[what](config.model.path)
    with pytest.raises(HyperAlignError, match=r"text encoders in .*model cannot be read.*again\.$"):
        load_text_encoders(config, CPU)


@dataclasses.dataclass
class Machine:
    """One of two machines, whose processes wait for each other but need not share a disk."""

    process_index: int
    meanwhile: Callable[[], object]
    """What the other one does before both continue."""
    num_processes: int = 2
    device: torch.device = CPU

    def free_memory(self) -> None:
        """Has none to free."""

    def wait_for_everyone(self) -> None:
        """Both have done their part."""
        self.meanwhile()


def embed(config: TrainConfig, machine: Any) -> CachedPromptEncoder:
    return cached_encoder(config, machine, PROMPTS)


def test_one_process_embeds_all_prompts_and_the_next_run_reads_them(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embed(config, Accelerator(cpu=True)).conditions(PROMPTS)["prompt_embeds"]
    monkeypatch.setattr("train.inputs.load_text_encoders", None)
    again = embed(config, Accelerator(cpu=True)).conditions(PROMPTS)["prompt_embeds"]
    assert first.shape == (6, 77, 16)
    assert torch.equal(first, again)


def test_two_machines_with_one_folder_embed_every_prompt_whichever_is_first(config: TrainConfig) -> None:
    late = Machine(1, meanwhile=lambda: None)
    texts = embed(config, Machine(0, meanwhile=lambda: embed(config, late)))
    assert texts.count_missing(PROMPTS) == [0]


def test_two_machines_without_a_shared_folder_stop_with_a_sentence(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.inputs.PATIENCE", 0.0)
    own = dataclasses.replace(config, data=DataConfig(embeddings=tmp_path / "own"))

    def other() -> None:
        with pytest.raises(HyperAlignError):
            embed(own, Machine(1, meanwhile=lambda: None))

    sentence = r"lacks \d+ embeddings .* Set data.embeddings to a folder that all machines of the run share"
    with pytest.raises(HyperAlignError, match=sentence):
        embed(config, Machine(0, meanwhile=other))


@pytest.mark.parametrize(
    ("base", "megabytes"), [("sd15", 0.118), ("sdxl", 0.318), ("flux", 6.295), ("sd3", 7.561)]
)
def test_a_text_takes_what_is_estimated(base: BaseName, megabytes: float, tmp_path: Path) -> None:
    config = TrainConfig(model=ModelConfig(base=base))
    for length in text_lengths(config):
        tokens = context_tokens(config, length)
        found = RandomPromptEncoder(*TEXT_WIDTHS[base], (tokens,), CPU).conditions(["a", "b"])
        cache = EmbeddingCache(tmp_path / str(length))
        cache.add(["a", "b"], {name: value.bfloat16() for name, value in found.items()})
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) / 2
    assert stored == pytest.approx(sum(text_bytes(config)), rel=0.01)
    assert stored / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_a_cache_beyond_its_limit_is_refused_before_the_encoders_are_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(gigabytes: float) -> TrainConfig:
        return dataclasses.replace(
            config, data=dataclasses.replace(config.data, embeddings_limit_gb=gigabytes)
        )

    monkeypatch.setattr("train.inputs.load_text_encoders", None)
    sentence = r"of 6 new texts take 0\.0 GB \(0\.2 MB a text\).*Raise it, name fewer data\.prompts"
    with pytest.raises(HyperAlignError, match=sentence):
        embed(limited(6 * 236e-6), Accelerator(cpu=True))
    check_cache_limit(limited(6 * 237e-6), [6])
    check_cache_limit(limited(1e-9), [0])  # what is there may be read
    (config.data.embeddings / "other").mkdir(parents=True)
    (config.data.embeddings / "other" / "a.safetensors").write_bytes(b"0" * 9000)
    with pytest.raises(HyperAlignError, match="or delete what other runs left there"):
        check_cache_limit(limited(6 * 237e-6), [6])
    flux = TrainConfig(model=ModelConfig(base="flux"), data=DataConfig(embeddings=config.data.embeddings))
    check_cache_limit(flux, [20000, 20000])
    with pytest.raises(HyperAlignError, match=r"take 251\.8 GB .*set data\.text_lengths to \[256\] alone"):
        check_cache_limit(flux, [40000, 40000])
