"""train/generate.py: every method draws a prompt list, whoever draws which part of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import tyro
from in_processes import in_processes, script
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperalign.checkpoint import load
from hyperalign.families.unet import TINY
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.image_sets import (
    ImageSet,
    RunRecord,
    image_path,
    open_image_set,
    read_record,
    write_record,
)
from hyperalign.perception import Perceived
from hyperalign.rewards import loading
from hyperalign.tiny.weights import HYPERNETWORKS
from train.generate import main
from train.generation.models import LiveEncoder
from train.generation.options import Options, TestTime
from train.generation.run import planned
from train.models.tiny import Tiny
from train.sampling import sample

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "train" / "recipes" / "tiny_s.toml"
PROMPTS = ["a red heart", "two apples"]
STEPS, CFG = 3, 4.0
ROUNDING = 1.5 / 255
"""A pixel may be rounded to the other side where float32 sums in another order."""


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lists") / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


Draws = Callable[..., ImageSet]


@pytest.fixture(scope="session")
def command(prompts: Path) -> Callable[..., list[str]]:
    """Returns the arguments that draw two images of each prompt into a folder."""

    def arguments(out: Path, *more: str) -> list[str]:
        return [
            "--recipe", str(RECIPE), "--prompts", str(prompts), "--out", str(out), "--steps", str(STEPS),
            "--cfg", str(CFG), "--images-per-prompt", "2", "--precision", "float32", *more,
        ]  # fmt: skip

    return arguments


@pytest.fixture(scope="session")
def draws(command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Draws:
    """Draws into a new folder with further options, and returns what is there then."""

    def draw(*more: str) -> ImageSet:
        out = tmp_path_factory.mktemp("drawn") / "images"
        assert main(command(out, *more)) == 0
        return open_image_set(out)

    return draw


@pytest.fixture(scope="session")
def base(draws: Draws) -> ImageSet:
    return draws()


@pytest.fixture(scope="session")
def static(draws: Draws) -> ImageSet:
    return draws("--hypernetwork", str(HYPERNETWORKS / "tiny_static.safetensors"), "--limit", "1")


@pytest.fixture(scope="session")
def static_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed static hypernetwork as a plain LoRA file: kohya's names."""
    from hyperalign.export import lora_tensors

    network = load(HYPERNETWORKS / "tiny_static.safetensors").network
    path = tmp_path_factory.mktemp("lora") / "static.safetensors"
    factors = network.factors(Perceived([], torch.zeros(1, TINY.text_channels)))
    save_file(lora_tensors(network, TINY.lora_names, factors, dtype=torch.float32), path)
    return path


def pixels(images: ImageSet) -> Tensor:
    """Returns (P, S, 3, H, W) in [0, 1]."""
    rows = [[np.asarray(Image.open(path)) for path in row] for row in images.images]
    return torch.from_numpy(np.array(rows)).permute(0, 1, 4, 2, 3) / 255


def sampled(name: str | None = None, limit: int = len(PROMPTS)) -> Tensor:
    """Returns what the trainer's validation samples with the same noise."""
    tiny = Tiny(load_tiny())
    hyperalign = None if name is None else load(HYPERNETWORKS / f"{name}.safetensors")
    chosen = PROMPTS[:limit]
    return sample(tiny, tiny, hyperalign, chosen, seeds=(0, 1), steps=STEPS, guidance_scale=CFG).images


def distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def test_the_base_model_draws_what_validation_samples(base: ImageSet) -> None:
    assert base.prompts == PROMPTS
    assert distance(pixels(base), sampled()) < ROUNDING
    assert base.run is not None
    assert base.run.settings.method == "base"
    assert base.run.settings.steps == STEPS
    seconds = base.run.seconds_per_image
    assert seconds is not None
    assert seconds.count == 4
    assert 0 < seconds.min <= seconds.median <= seconds.max


@pytest.mark.parametrize("name", ["tiny_s", "tiny_p", "tiny_i", "tiny_static"])
def test_a_hypernetwork_draws_what_validation_samples(name: str, draws: Draws, base: ImageSet) -> None:
    images = draws("--hypernetwork", str(HYPERNETWORKS / f"{name}.safetensors"), "--limit", "1")
    assert distance(pixels(images), sampled(name, 1)) < ROUNDING
    assert distance(pixels(images), pixels(base)[:1]) > 0.1
    assert images.run is not None
    assert images.run.settings.method == {"tiny_static": "static"}.get(name, name[-1].upper())
    assert images.run.settings.method_file == f"{name}.safetensors"
    assert len(images.run.settings.method_sha256) == 64


@pytest.mark.parametrize("naming", ["kohya", "peft", "diffusers"])
def test_a_lora_file_draws_what_its_hypernetwork_draws(
    naming: str, draws: Draws, static: ImageSet, static_lora: Path, tmp_path: Path
) -> None:
    path = static_lora if naming == "kohya" else tmp_path / "adapter_model.safetensors"
    if naming != "kohya":
        tensors = load_file(static_lora)
        prefix = "base_model.model." if naming == "peft" else "unet."
        renamed: dict[str, Tensor] = {}
        for target in load(HYPERNETWORKS / "tiny_static.safetensors").header.targets:
            down, up, _ = TINY.lora_names.keys(target.name)
            renamed[f"{prefix}{target.name}.lora_A.weight"] = tensors[down] / 2
            renamed[f"{prefix}{target.name}.lora_B.weight"] = tensors[up] * (1 if naming == "peft" else 2)
        save_file(renamed, path)
        rank = next(iter(renamed.values())).shape[0]
        path.with_name("adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 2 * rank}))
    images = draws("--lora", str(path), "--limit", "1")
    assert distance(pixels(images), pixels(static)[:1]) < 3 * ROUNDING
    assert images.run is not None
    assert images.run.settings.method == "lora"


def test_strength_zero_is_the_base_model(draws: Draws, base: ImageSet, static_lora: Path) -> None:
    images = draws("--lora", str(static_lora), "--strength", "0", "--limit", "1")
    assert distance(pixels(images), pixels(base)[:1]) < ROUNDING


def test_a_fine_tuned_model_is_drawn_with_its_own_weights(
    draws: Draws, base: ImageSet, tmp_path: Path
) -> None:
    unet = load_tiny().unet
    unet.save_pretrained(tmp_path / "model" / "unet")
    images = draws("--fine-tuned", str(tmp_path / "model"), "--limit", "1")
    assert distance(pixels(images), pixels(base)[:1]) < ROUNDING
    torch.nn.init.zeros_(unet.conv_out.weight)
    unet.save_pretrained(tmp_path / "changed")
    changed = draws("--fine-tuned", str(tmp_path / "changed"), "--limit", "1")
    assert distance(pixels(changed), pixels(base)[:1]) > 0.1
    assert changed.run is not None
    assert changed.run.settings.method_file == "changed"


def rewards(images: ImageSet) -> Tensor:
    """Returns the tiny reward of each image, (P, S)."""
    reward = loading.load("tiny reward", Path())
    shown = pixels(images)
    rows = [reward.score(row, [prompt] * len(row)) for prompt, row in zip(images.prompts, shown, strict=True)]
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["best-of-N", "epsilon-greedy", "zero-order"])
def test_a_search_never_draws_a_worse_image_than_the_base(mode: str, draws: Draws, base: ImageSet) -> None:
    options = ("--test-time", mode, "--search.candidates", "4", "--search.round-size", "2", "--limit", "1")
    images = draws(*options)
    gain = rewards(images) - rewards(base)[:1]
    assert float(gain.min()) > -0.05  # of 8-bit pixels
    assert float(gain.max()) > 0.1
    assert images.run is not None
    assert images.run.settings.method == mode
    if mode == "zero-order":
        assert distance(pixels(draws(*options, "--batch", "1")), pixels(images)) < ROUNDING


@pytest.mark.parametrize("gradient", ["prediction", "through-model"])
def test_guidance_raises_the_reward(gradient: str, draws: Draws, base: ImageSet) -> None:
    images = draws(
        "--test-time", "guidance", "--guidance.gradient", gradient, "--guidance.start", "0",
        "--guidance.end", "1", "--guidance.strength", "0.1", "--limit", "1",
    )  # fmt: skip
    assert float((rewards(images) - rewards(base)[:1]).mean()) > 0.1


def test_guidance_outside_its_steps_draws_the_base(draws: Draws, base: ImageSet) -> None:
    options = ("--test-time", "guidance", "--guidance.start", "0.9", "--guidance.end", "1", "--limit", "1")
    assert distance(pixels(draws(*options)), pixels(base)[:1]) < ROUNDING


def test_text_encoders_see_each_prompt_of_a_batch_once() -> None:
    seen: list[list[str]] = []

    def encode(texts: Sequence[str]) -> dict[str, Tensor]:
        seen.append(list(texts))
        return {"lengths": torch.tensor([float(len(text)) for text in texts])}

    found = LiveEncoder(encode).conditions(["abc", "a", "abc", "", ""])
    assert found["lengths"].tolist() == [3.0, 1.0, 3.0, 0.0, 0.0]
    assert seen == [["abc", "a", ""]]


def test_a_batch_does_not_change_the_images(draws: Draws, base: ImageSet) -> None:
    assert distance(pixels(draws("--batch", "3")), pixels(base)) < ROUNDING


def test_two_processes_draw_what_one_draws(
    command: Callable[..., list[str]], base: ImageSet, tmp_path: Path
) -> None:
    done = in_processes(2, tmp_path, script, "train/generate.py", *command(tmp_path / "two"))
    assert [process.status for process in done] == [0, 0], done
    images = open_image_set(tmp_path / "two")
    assert distance(pixels(images), pixels(base)) < ROUNDING
    assert images.run is not None
    assert images.run.environment["processes"] == 2
    assert images.run.seconds_per_image is not None
    assert images.run.seconds_per_image.count == 4


def test_a_run_goes_on_where_it_stopped(
    command: Callable[..., list[str]], base: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four images are drawn, one of them is then damaged."""
    from train.generation import run

    out, left, save = tmp_path / "images", [2], run.save_image

    def stops(path: Path, *others: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save(path, *others)

    monkeypatch.setattr(run, "save_image", stops)
    assert main(command(out, "--batch", "1")) == 130
    record = read_record(out)
    assert record is not None
    assert not record.complete
    monkeypatch.undo()
    kept, damaged = image_path(out, 0, 0), image_path(out, 0, 1)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    written = kept.stat().st_mtime_ns
    assert main(command(out, "--batch", "4")) == 0
    assert kept.stat().st_mtime_ns == written
    images = open_image_set(out)
    assert distance(pixels(images), pixels(base)) < ROUNDING
    assert images.run is not None
    assert images.run.seconds_per_image is not None
    assert images.run.seconds_per_image.count == 4


@pytest.mark.parametrize("method", [name for name in get_args(TestTime) if name != "none"])
def test_a_run_of_every_method_goes_on_from_its_record(
    command: Callable[..., list[str]], tmp_path: Path, method: str
) -> None:
    options = tyro.cli(Options, args=command(tmp_path, "--test-time", method))
    write_record(tmp_path, RunRecord(planned(options).settings))
    record = read_record(tmp_path)
    assert record is not None
    assert planned(options).settings == record.settings


def test_genevals_metadata_is_kept(command: Callable[..., list[str]], tmp_path: Path) -> None:
    line = {
        "tag": "single_object", "include": [{"class": "apple", "count": 1}], "prompt": "an apple",
    }  # fmt: skip
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line | {"seen": place}) + "\n" for place in (0, 1)), encoding="utf-8")
    arguments = command(tmp_path / "images", "--images-per-prompt", "1")
    arguments[arguments.index("--prompts") + 1] = str(path)
    assert main(arguments) == 0
    assert open_image_set(tmp_path / "images").metadata == [line | {"seen": 0}, line | {"seen": 1}]
