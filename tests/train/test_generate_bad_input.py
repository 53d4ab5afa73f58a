"""train/generate.py: each wrong input is one sentence, and nothing is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hyperalign.checkpoint import load, save
from hyperalign.families.unet import SD15
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.image_sets import image_path, open_image_set
from hyperalign.tiny.weights import HYPERNETWORKS
from train import generate as command
from train.generate import main

RECIPE = Path(__file__).parents[2] / "train" / "recipes" / "tiny_s.toml"
Fails = Callable[..., str]


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs the command with a list of prompts and further options; returns its one line of error."""

    def run(text: str, *more: str, recipe: str = str(RECIPE), suffix: str = ".txt") -> str:
        prompts = tmp_path / f"prompts{suffix}"
        prompts.write_text(text, encoding="utf-8")
        arguments = ["--prompts", str(prompts), "--out", str(tmp_path / "out"), "--steps", "1", *more]
        assert main([*(["--recipe", recipe] if recipe else []), *arguments]) == 2
        assert not (tmp_path / "out" / "run.json").exists()
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("error: ")
        return line

    return run


def test_wrong_prompts_are_refused(fails: Fails) -> None:
    assert "holds no prompt" in fails("\n\n")
    assert "zebra" in fails("a red heart\na zebra\n")
    assert "ends in '.xyz'" in fails("a red heart", suffix=".xyz")
    half = json.dumps({"tag": "counting", "include": [{"class": "cat"}], "prompt": "a cat"})
    assert "GenEval's" in fails(half, suffix=".jsonl")
    assert "There is no prompt file" in fails("", "--prompts", "nowhere.txt")


def test_wrong_options_are_refused(fails: Fails, tmp_path: Path) -> None:
    assert "Give --recipe" in fails("a red heart", recipe="")
    assert "There is no recipe" in fails("a red heart", recipe="nothing.toml")
    assert "--images-per-prompt is 0" in fails("a red heart", "--images-per-prompt", "0")
    assert "expected one method at most" in fails(
        "a red heart", "--lora", "a.safetensors", "--test-time", "guidance"
    )
    assert "count is 0" in fails("a red heart", "--test-time", "best-of-N", "--search.candidates", "0")
    assert "0 <= start <= end" in fails("a red heart", "--test-time", "guidance", "--guidance.start", "0.9")
    assert "There is no reward 'nice'" in fails(
        "a red heart", "--test-time", "best-of-N", "--rewards", "nice", "1"
    )
    assert "model_index.json cannot be read" in fails("a red heart", "--model", str(tmp_path), recipe="")


def test_a_reward_whose_weights_are_missing_is_named(fails: Fails, tmp_path: Path) -> None:
    assert "PickScore" in fails("a red heart", "--test-time", "best-of-N", "--rewards", "pickscore", "1")


def test_a_hypernetwork_of_another_base_is_refused(fails: Fails, tmp_path: Path) -> None:
    made = load(HYPERNETWORKS / "tiny_s.safetensors")
    path = tmp_path / "sd15.safetensors"
    save(path, made.network, dataclasses.replace(made.header, base=SD15.fingerprint()))
    assert "trained for the base model family 'sd15'" in fails("a red heart", "--hypernetwork", str(path))
    path.write_bytes(path.read_bytes()[:-9])
    assert "not a whole safetensors file" in fails("a red heart", "--hypernetwork", str(path))
    assert "There is no file" in fails("a red heart", "--hypernetwork", "nothing.safetensors")


def test_a_lora_that_does_not_fit_is_refused(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"

    def made(name: str, width: int, layer: str = layer) -> str:
        matrices = {"lora_A": torch.zeros(2, width), "lora_B": torch.zeros(64, 2)}
        save_file({f"{name}{layer}.{key}.weight": value for key, value in matrices.items()}, path)
        return fails("a red heart", "--lora", str(path))

    assert "does not fit the base model" in made("unet.", 320)
    assert "does not fit the base model" in made("unet.", 64, "down_blocks.7.attentions.0.to_q")
    assert "does not fit the base model" in made("transformer.", 64)
    assert "adapter_config.json cannot be read" in made("base_model.model.", 64)
    save_file({"weight": torch.zeros(2)}, path)
    assert "is no LoRA" in fails("a red heart", "--lora", str(path))
    path.write_bytes(b"nothing")
    assert "not a whole safetensors file" in fails("a red heart", "--lora", str(path))
    assert "There is no LoRA" in fails("a red heart", "--lora", str(tmp_path))


def test_a_fine_tuned_model_of_another_shape_is_refused(fails: Fails, tmp_path: Path) -> None:
    assert "There is no config.json" in fails("a red heart", "--fine-tuned", str(tmp_path))
    unet = load_tiny().unet
    unet.save_config(tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 2}))
    assert "layers_per_block is 2 and should be 1" in fails(
        "a red heart", "--fine-tuned", str(tmp_path / "unet")
    )


def test_images_of_other_settings_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red heart\n", encoding="utf-8")
    arguments = ["--recipe", str(RECIPE), "--prompts", str(prompts), "--out", str(out), "--steps", "1"]
    one = [*arguments, "--images-per-prompt", "1"]
    assert main(one) == 0
    before = image_path(out, 0, 0).read_bytes()
    assert main([*one, "--cfg", "2"]) == 2
    assert "guidance_scale was 4.0 and is now 2.0" in capsys.readouterr().err
    prompts.write_text("a blue heart\n", encoding="utf-8")
    assert main(one) == 2
    assert "prompts_sha256" in capsys.readouterr().err
    (out / "run.json").unlink()
    assert main(one) == 2
    assert "has images, but no run.json" in capsys.readouterr().err
    assert image_path(out, 0, 0).read_bytes() == before
    assert open_image_set(out).run is None


def test_a_full_gpu_says_which_option_to_lower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(command, "generate", full)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red heart\n", encoding="utf-8")
    arguments = ["--recipe", str(RECIPE), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--batch", "8"]) == 1
    assert "Lower --batch from 8 to 4" in capsys.readouterr().err
    assert main([*arguments, "--batch", "1"]) == 1
    assert "--batch is 1 already" in capsys.readouterr().err
