"""`--check` of a recipe for a real base: complete files pass, and every problem is reported at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from hyperalign.errors import HyperAlignError
from hyperalign.hypernetwork import HyperNetworkConfig
from train.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig, ValidationConfig
from train.data.shards import ShardHeader, shard_path, write_shard
from train.inputs import smoke_inputs
from train.models.architectures import ModelSize, architecture
from train.models.image_encoder import image_encoder
from train.preflight.check import Device, check, check_inputs, memory_line
from train.preflight.estimate import Memory
from train.preflight.fit import fitted_to
from train.preflight.input_checks import Problems, backbone_of, check_room
from train.train import main
from train.trainer import Trainer

CPU = torch.device("cpu")


def write_base(folder: Path) -> None:
    """A reduced SD 1.5 in diffusers' layout; its text encoder is a name only."""
    unet: Any = architecture("sd15", ModelSize(width_divisor=10))
    unet.save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4, latent_channels=4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    DDIMScheduler().save_pretrained(folder / "scheduler")
    parts = {"text_encoder": ["transformers", ""], "tokenizer": ["transformers", ""], "none": [None, None]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", **parts}), encoding="utf-8")
    for name in ("text_encoder", "tokenizer"):
        (folder / name).mkdir()
    save_file({"weight": torch.zeros(1)}, folder / "text_encoder" / "model.safetensors")
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def write_preference(config: TrainConfig, encoder: str, shape: tuple[int, ...] = (4, 8, 8)) -> None:
    captions = ["a", "a a", "a"]
    side = config.model.resolution
    header = ShardHeader(captions, captions, encoder, side)
    write_shard(shard_path(config.data.preference, 0), {(side, side): torch.zeros(3, *shape)}, header)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "sd15"
    write_base(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, base: Path) -> TrainConfig:
    """A recipe whose files are all there."""
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a\na a\n", encoding="utf-8")
    (tmp_path / "validation.txt").write_text("a a a\n", encoding="utf-8")
    (tmp_path / "rewards" / "clip-vit-large-patch14").mkdir(parents=True)
    save_file(
        {"weight": torch.zeros(1)}, tmp_path / "rewards" / "clip-vit-large-patch14" / "model.safetensors"
    )
    made = TrainConfig(
        model=ModelConfig(base="sd15", path=tmp_path / "base", resolution=64, statistics_prompts=2),
        network=HyperNetworkConfig(layers=1, width=32, heads=4),
        objective=ObjectiveConfig(rewards={"clip": 1.0}, prompt_batch=2, preference_batch=4, micro_batch=2),
        data=DataConfig(
            prompts=tmp_path / "prompts.txt", preference=tmp_path / "preferred",
            embeddings=tmp_path / "embeddings", rewards=tmp_path / "rewards",
        ),
        validation=ValidationConfig(prompts=tmp_path / "validation.txt"),
        run=RunConfig(out=tmp_path / "run"),
    )  # fmt: skip
    write_preference(made, image_encoder(made, CPU).fingerprint)
    return made


def problems(config: TrainConfig) -> list[str]:
    """The numbered problems of a check."""
    with pytest.raises(HyperAlignError) as error:
        check(config)
    return [line for line in str(error.value).splitlines() if line[:1].isdigit()]


def test_a_sound_recipe_is_found_what_it_takes(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    report = check(config)
    unet = UNet2DConditionModel.from_pretrained(config.model.path / "unet")
    numbers = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    for line in (
        f"frozen parameters: backbone {numbers:.1f} M, autoencoder",
        "for 80 attention projections",
        "a step of 4 processes: 8 rollouts of 10 steps, 16 images with reward gradient, 16 preference",
        "data: 2 prompts, 1 for validation, 2 captions of images",
        "preference images: 3 images (3 of 64 x 64)",
        "starts anew in",
        "(4 texts to encode once)",
        "estimate of peak memory",
        "estimate of speed",
    ):
        assert line in report, line
    assert not config.run.out.exists()


def automatic(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, gradient_checkpointing="auto"),
        objective=dataclasses.replace(config.objective, micro_batch="auto"),
    )


def test_what_is_automatic_is_checked_as_it_will_run(config: TrainConfig) -> None:
    choice = 'recompute nothing (micro_batch = 4, gradient_checkpointing = "none"), by estimate on 80 GiB'
    assert f"auto: backward passes of 4 images {choice}" in check(automatic(config))


def test_a_run_says_what_it_chose_and_runs_with_it(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    found = fitted_to(automatic(config), Accelerator(cpu=True))
    assert found.objective.micro_batch == 4
    assert found.model.gradient_checkpointing == "none"
    assert caplog.messages[0].startswith("auto: backward passes of 4 images recompute nothing")
    assert fitted_to(found, Accelerator(cpu=True)) is found
    assert len(caplog.messages) == 1


def test_all_problems_are_found_at_once_with_the_usual_sizes(tmp_path: Path) -> None:
    config = TrainConfig(
        model=ModelConfig(base="sd15", path=tmp_path / "nothing"),
        objective=ObjectiveConfig(rewards={"clip": 1.0, "hpsv3": 1.0}),
        data=DataConfig(prompts=tmp_path / "none.txt", rewards=tmp_path),
        validation=ValidationConfig(rewards={"tiny reward": 1.0}),
        run=RunConfig(out=tmp_path / "run", trackers=("no_such_tracker",)),
    )
    found = problems(config)
    named = ("no reward 'hpsv3'", "is incomplete", "no prompt file", "validation.prompts is empty",
             "latent shards", "model.safetensors (1.7 GB)", "embedded tiny", "no_such_tracker")  # fmt: skip
    for words in named:
        assert sum(words in line for line in found) == 1, words
    assert len(found) == len(named)
    known = dataclasses.replace(config, objective=ObjectiveConfig(rewards={"clip": 1.0}))
    with pytest.raises(HyperAlignError, match="backbone 859.5 M"):
        check(known)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_shapes(config: TrainConfig) -> None:
    shard_path(config.data.preference, 0).unlink()
    write_preference(config, image_encoder(config, CPU).fingerprint, (16, 8, 8))


def another_family(config: TrainConfig) -> None:
    unet: Any = architecture("sdxl", ModelSize(width_divisor=10))
    unet.save_config(config.model.path / "unet")


DAMAGE: dict[str, tuple[Callable[[TrainConfig], object], str]] = {
    "backbone": (
        lambda c: truncate(c.model.path / "unet" / "diffusion_pytorch_model.safetensors"),
        "unet/diffusion_pytorch_model.safetensors is not a whole safetensors file",
    ),
    "weights": (
        lambda c: (c.model.path / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        "lacks diffusion_pytorch_model.safetensors",
    ),
    "configuration": (
        lambda c: (c.model.path / "unet" / "config.json").write_text("{", encoding="utf-8"),
        "unet/config.json is not of a UNet2DConditionModel",
    ),
    "family": (another_family, "holds a sdxl model; expected sd15"),
    "text encoder": (
        lambda c: (c.model.path / "text_encoder" / "model.safetensors").unlink(),
        "text_encoder lacks model.safetensors",
    ),
    "index": (lambda c: (c.model.path / "model_index.json").unlink(), "lacks model_index.json"),
    "shard": (lambda c: truncate(shard_path(c.data.preference, 0)), "shards in"),
    "encoder": (lambda c: write_preference(c, "another"), "is encoded by another; expected"),
    "latents": (other_shapes, "latents of the shape (16, 8, 8); expected (4, 8, 8)"),
    "reward": (
        lambda c: truncate(c.data.rewards / "clip-vit-large-patch14" / "model.safetensors"),
        "clip-vit-large-patch14/model.safetensors is not a whole",
    ),
    "prompts": (lambda c: c.data.prompts.write_text("\n", encoding="utf-8"), "prompts.txt holds no prompt"),
    "out": (lambda c: c.run.out.write_text("x", encoding="utf-8"), "is not a folder that can be written to"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_named(config: TrainConfig, what: str) -> None:
    damage, words = DAMAGE[what]
    damage(config)
    problems = Problems()
    problems.run(lambda: backbone_of(config))
    check_inputs(config, problems, None)
    assert [line for line in problems.found if words in line] == problems.found[:1]
    assert len(problems.found) == 1


def test_a_run_resumes_only_with_its_own_recipe(config: TrainConfig) -> None:
    accelerator, problems = Accelerator(cpu=True), Problems()
    trainer = Trainer(config, smoke_inputs(config, accelerator, ModelSize(width_divisor=10)), accelerator)
    trainer.step = 7
    trainer._save_checkpoint()
    assert f"resumes from step 7 in {config.run.out}" in check_inputs(config, problems, None)
    assert not problems.found
    lower = dataclasses.replace(config, objective=dataclasses.replace(config.objective, micro_batch=1))
    check_inputs(lower, problems, None)
    assert not problems.found
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, weight_decay=0.5))
    check_inputs(other, problems, None)
    assert [("another recipe" in line) for line in problems.found] == [True]


def test_perception_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(model=ModelConfig(base="flux", path=tmp_path, resolution=64, perception_blocks=40))
    assert any("first 40 blocks; expected 1 to 19" in line for line in problems(config))


def test_needs_of_one_disk_are_added_up(tmp_path: Path) -> None:
    check_room({"checkpoints": (tmp_path / "a", 1), "embeddings": (tmp_path / "b", 1)})
    with pytest.raises(HyperAlignError, match=r"checkpoints 0.0, embeddings 1024.0\)"):
        check_room({"checkpoints": (tmp_path / "a", 1), "embeddings": (tmp_path / "b", 1 << 40)})


def test_a_gpu_that_is_too_small_is_found_what_to_lower() -> None:
    memory = Memory(weights=2 << 30, optimiser=1 << 30, rollout=0, reward=0, decoder=4 << 30, backbone=0,
                    preference=0)  # fmt: skip
    lower = "set objective.micro_batch = 1"
    assert f"WARNING: X has 6.0 GiB: {lower}" in memory_line(
        memory, Device(CPU, "X", 6 << 30), lambda total: lower if total == 6 << 30 else ""
    )
    assert "WARNING" not in memory_line(memory, Device(CPU, "X", 8 << 30), lambda _: pytest.fail("it fits"))


def test_a_complaint_is_kept_once_and_other_errors_are_not_hidden() -> None:
    problems = Problems()

    def complain() -> None:
        raise HyperAlignError("no")

    assert problems.run(lambda: 3) == 3
    assert problems.run(complain) is None
    problems.run(complain)
    assert problems.found == ["no"]
    with pytest.raises(ZeroDivisionError):
        problems.run(lambda: 1 / 0)


def test_the_command_says_it_in_numbered_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[model]\nbase = "sd15"\nresolution = 64\n[objective]\nrewards = { clip = 1.0 }\n', encoding="utf-8"
    )
    assert main(["--recipe", str(path), "--check", "--run.out", str(tmp_path / "run")]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: the run cannot start, 5 problems:\n1. The base model in ")
