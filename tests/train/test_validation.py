"""Validation: every prompt once in any number of processes, and diversity by what no loss optimises."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from hyperalign.errors import HyperAlignError
from train.config import ObjectiveConfig, TrainConfig, ValidationConfig
from train.data.embeddings import CachedPromptEncoder, EmbeddingCache
from train.models.image_embedding import KEY, diversity_embedding, load_encoder
from train.tiny.evaluate import metrics, sample_all
from train.validation import in_order, reward_validation, share_of_prompts

CPU = torch.device("cpu")


class Brightness:
    """A reward that tells images and prompts apart; its embedding counts how often it is asked."""

    name = "brightness"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.embedded = scale, 0

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return self.scale * (images.mean(dim=(1, 2, 3)) + lengths)

    def embed_images(self, images: Tensor) -> Tensor:
        self.embedded += 1
        return images.flatten(1)


class Processes:
    """What one of several processes sees of Accelerate when all of them gather the same rows in turn."""

    def __init__(self, process_index: int, num_processes: int, exchange: dict[int, list[Tensor]]) -> None:
        self.process_index, self.num_processes, self.exchange = process_index, num_processes, exchange
        self.device, self.is_main_process = CPU, process_index == 0
        self.calls = 0

    def gather(self, values: Tensor) -> Tensor:
        """Keeps this process's rows; the last process receives all."""
        rows = self.exchange.setdefault(self.calls, [])
        self.calls += 1
        rows.append(values)
        return torch.cat([*rows, *[values] * (self.num_processes - len(rows))])


@given(count=st.integers(1, 40), processes=st.integers(1, 9))
def test_every_prompt_is_scored_once_and_every_process_samples_as_many(count: int, processes: int) -> None:
    shares = [share_of_prompts(count, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    exchange: dict[int, list[Tensor]] = {}
    for rank, share in enumerate(shares):
        process: Any = Processes(rank, processes, exchange)
        whole = in_order(torch.tensor(share).float(), count, process)
    assert whole.tolist() == list(range(count))


def test_a_prompt_is_validated_at_one_padding_whatever_its_batch(tmp_path: Path) -> None:
    for length in (4, 8):
        EmbeddingCache(tmp_path / str(length)).add(["a", "b", "c"], {"x": torch.ones(3, length, 2)})
    encoder = CachedPromptEncoder(tmp_path, (4, 8), CPU)
    batches = [["a"], ["b"], ["c"], ["a", "b"], ["b", "c"], ["a", "b", "c"]]
    assert {encoder.conditions(batch)["x"].shape[1] for batch in batches} == {4, 8}
    assert {encoder.at(4).conditions(batch)["x"].shape[1] for batch in batches} == {4}
    assert len(encoder.caches) == 2


# Diversity


def rewards_of(**optimised: float) -> TrainConfig:
    return TrainConfig(objective=ObjectiveConfig(rewards=optimised))


def test_an_optimised_reward_does_not_measure_diversity() -> None:
    trained, measured = Brightness(), Brightness()
    rewards: Any = {"trained": trained, "measured": measured}
    embed = diversity_embedding(rewards_of(trained=1.0), rewards, CPU)
    assert embed is not None
    embed(torch.zeros(1, 3, 2, 2))
    assert (trained.embedded, measured.embedded) == (0, 1)
    assert diversity_embedding(rewards_of(trained=1.0, measured=0.1), rewards, CPU) is None
    unused = dataclasses.replace(rewards_of(trained=1.0), objective=ObjectiveConfig(reward_weight=0.0))
    assert diversity_embedding(unused, rewards, CPU) is not None


def test_without_such_an_encoder_no_diversity_is_reported(
    make_base: Callable[..., Any], tmp_path: Path
) -> None:
    base, process = make_base(everywhere=False), Processes(0, 1, {})
    rewards, any_process = {"trained": Brightness()}, process
    found = reward_validation(
        rewards_of(trained=1.0),
        base,
        base,
        rewards,
        ["a"],
        any_process,  # type: ignore[arg-type]
    )(None, tmp_path / "grid.png")
    assert "diversity" not in found
    assert "trained" in found


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes), encoding="utf-8")
    return folder


def test_a_dinov2_in_a_folder_measures_it(dinov2: Path) -> None:
    config = TrainConfig(validation=ValidationConfig(diversity_encoder=dinov2))
    embed = diversity_embedding(config, {}, CPU)
    assert embed is not None
    light, dark = embed(torch.ones(1, 3, 40, 60)), embed(torch.zeros(1, 3, 40, 60))
    assert light.shape == (1, 16)
    assert light.dtype == torch.float32
    assert (light - dark).abs().max() > 1e-3


def test_a_folder_without_a_whole_encoder_is_refused(dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(HyperAlignError, match=rf"{KEY} .* has no config.json, .* expected an image encoder"):
        load_encoder(tmp_path, CPU, KEY)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((dinov2 / name).read_bytes())
    with pytest.raises(HyperAlignError, match="has no model.safetensors"):
        load_encoder(tmp_path, CPU, KEY)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(HyperAlignError, match=f"{KEY} .* cannot be loaded"):
        load_encoder(tmp_path, CPU, KEY)


def test_an_encoder_that_lacks_tensors_is_refused(dinov2: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((dinov2 / name).read_bytes())
    tensors = load_file(dinov2 / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(HyperAlignError, match="lacks 1 tensors, first layernorm.weight"):
        load_encoder(tmp_path, CPU)


def test_the_tiny_models_validation_reports_diversity_over_seeds_alone(tiny_base: Any) -> None:
    settings: dict[str, Any] = {"steps": 1, "guidance_scale": 1.0}
    one = metrics(sample_all(tiny_base, None, 2, seeds=(0,), **settings))
    two = metrics(sample_all(tiny_base, None, 2, seeds=(0, 1), **settings))
    assert "diversity" not in one
    assert two["diversity"] > 0
    assert two["spread"].keys() == {"reward", "validation_reward"}


@pytest.fixture(scope="module")
def tiny_base() -> Any:
    from hyperalign.hosts.diffusers.tiny import load_tiny
    from train.models.tiny import Tiny

    return Tiny(load_tiny(CPU))
