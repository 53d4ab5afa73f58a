"""train/analyse.py from its options to its files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hyperalign import checkpoint
from hyperalign.errors import HyperAlignError
from hyperalign.tiny.weights import HYPERNETWORKS
from hyperalign.trace_energy import PARTS
from train import analyse
from train.analysis import plots
from train.analysis.weights import check_not_zero
from train.config import ModelConfig, ObjectiveConfig, TrainConfig, ValidationConfig
from train.models.image_embedding import unoptimised_reward

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "train" / "recipes" / "tiny_s.toml"
PROMPTS = ["a red heart", "two dogs", "a cat left of a dog", "a blue circle"]
STEPS = 6


def recipe_with(rewards: dict[str, float], measured: dict[str, float], base: Any = "sd15") -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(base=base), objective=ObjectiveConfig(rewards=rewards),
        validation=ValidationConfig(rewards=measured),
    )  # fmt: skip


def test_diversity_is_measured_by_a_reward_that_is_not_optimised() -> None:
    config = recipe_with({"hpsv2.1": 1.0, "clip": 1.0}, {"clip": 1.0, "pickscore": 1.0})
    assert unoptimised_reward(config) == "pickscore"
    unused = recipe_with({"hpsv2.1": 1.0, "clip": 0.0}, {"clip": 1.0, "pickscore": 1.0})
    assert unoptimised_reward(unused) == "clip"
    with pytest.raises(HyperAlignError, match="Name the folder of an image encoder"):
        unoptimised_reward(recipe_with({"clip": 1.0}, {"clip": 1.0}))
    assert unoptimised_reward(recipe_with({"tiny reward": 1.0}, {}, "tiny")) == "tiny validation reward"


def test_the_encoder_of_the_command_comes_before_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, str]] = []

    def load(folder: Path, _device: torch.device, option: str) -> Any:
        asked.append((folder, option))

    monkeypatch.setattr(analyse, "load_encoder", load)
    config = TrainConfig(validation=ValidationConfig(diversity_encoder=tmp_path / "own"))
    options = analyse.Images(recipe=RECIPE, hypernetworks=(S,))
    named = dataclasses.replace(options, diversity_encoder=tmp_path / "named")
    device = torch.device("cpu")
    assert analyse.embedding_of(options, config, device)[0] == "own"
    assert analyse.embedding_of(named, config, device)[0] == "named"
    assert asked == [
        (tmp_path / "own", "validation.diversity_encoder"), (tmp_path / "named", "--diversity-encoder"),
    ]  # fmt: skip


# The command


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def command(kind: str, *arguments: object, recipe: Path = RECIPE) -> int:
    return analyse.main([kind, "--recipe", str(recipe), *(str(argument) for argument in arguments)])


def test_weights_are_written_as_three_figures_with_their_numbers(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "deep" / "out", HYPERNETWORKS / "tiny_p.safetensors"
    arguments = ("--hypernetwork", file, "--prompts", prompt_file, "--steps", STEPS, "--out", out)
    assert command("weights", *arguments, "--panels", 2) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        f"{name}.{kind}" for name in sorted(analyse.WEIGHT_FILES) for kind in ("json", "png")
    ]
    assert capsys.readouterr().out.count("Wrote ") == 6
    reports = {name: json.loads((out / f"{name}.json").read_text()) for name in analyse.WEIGHT_FILES}
    for report in reports.values():
        assert report["prompts"] == PROMPTS
        assert report["variant"] == "P"
    assert len(reports["dynamics"]["cosine"]["mean"]) == STEPS
    assert reports["dynamics"]["generated_at"] == reports["variation"]["spread"]["generated_at"]
    assert torch.tensor(reports["variation"]["plane"]["points"]).shape == (2, len(PROMPTS), 2)
    assert sum(reports["division"]["shares"].values()) == pytest.approx(1.0, abs=1e-5)
    assert reports["division"]["standard_error"].keys() == set(PARTS)
    for name in analyse.WEIGHT_FILES:
        with Image.open(out / f"{name}.png") as plot:
            assert min(plot.size) > 300
            assert len(plot.convert("RGB").getcolors(1 << 20) or []) > 20


def test_hypernetworks_of_one_name_are_called_by_their_folders() -> None:
    ends = [Path("runs/s/hypernetwork.safetensors"), Path("runs/dance_grpo/hypernetwork.safetensors")]
    assert analyse.names_of(ends) == ["s", "dance_grpo"]
    assert analyse.names_of([*ends[:1], Path("mine.safetensors")]) == ["hypernetwork", "mine"]


def test_diversity_is_written_with_the_images_of_every_method(tmp_path: Path, prompt_file: Path) -> None:
    files = [HYPERNETWORKS / f"tiny_{variant}.safetensors" for variant in "si"]
    sizes = ("--steps", 2, "--seeds", 2, "--count", 3, "--shown", 2)
    arguments = ("--prompts", prompt_file, "--out", tmp_path / "out", *sizes)
    assert command("diversity", "--hypernetworks", *files, *arguments) == 0
    report = json.loads((tmp_path / "out" / "diversity.json").read_text())
    assert [row["method"] for row in report["methods"]] == ["base", "tiny_s", "tiny_i"]
    assert report["encoder"] == "tiny validation reward"
    assert len(report["prompts"]) == 3
    assert set(report["prompts"]) < set(PROMPTS)
    with Image.open(tmp_path / "out" / "diversity.png") as plot:
        assert min(plot.size) > 300


def refused(capsys: pytest.CaptureFixture[str], kind: str, *arguments: object, recipe: Path = RECIPE) -> str:
    """Returns the one sentence with which the command refuses."""
    assert command(kind, *arguments, recipe=recipe) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


S = HYPERNETWORKS / "tiny_s.safetensors"


def test_bad_inputs_are_one_sentence_before_anything_is_sampled(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analyse, "sampling_inputs", lambda *_: pytest.fail("it went on"))
    monkeypatch.chdir(tmp_path)
    few, blocked = tmp_path / "few.txt", tmp_path / "file"
    few.write_text("a red heart\ntwo dogs\n")
    blocked.write_text("")
    weights = ("weights", "--hypernetwork")
    listed = ("--prompts", prompt_file)
    assert "gives 2 prompts" in refused(capsys, *weights, S, "--prompts", few)
    assert "gives 2 prompts with --count 2" in refused(capsys, *weights, S, *listed, "--count", 2)
    assert "--steps is 1; expected 2 or more" in refused(capsys, *weights, S, *listed, "--steps", 1)
    assert "--panels is 1" in refused(capsys, *weights, S, *listed, "--panels", 1)
    assert "Choose another --out" in refused(capsys, *weights, S, *listed, "--out", blocked)
    assert "no file" in refused(capsys, *weights, tmp_path / "none.safetensors", *listed)
    assert "no prompt file" in refused(capsys, *weights, S, "--prompts", tmp_path / "none.txt")
    assert "no recipe" in refused(capsys, *weights, S, *listed, recipe=tmp_path / "none.toml")
    images = ("diversity", "--hypernetworks", S, *listed)
    assert "--seeds is 1; expected 2 or more" in refused(capsys, *images, "--seeds", 1)
    assert "has no config.json" in refused(capsys, *images, "--diversity-encoder", tmp_path / "none")


def test_a_hypernetwork_of_another_base_or_before_training_is_refused(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = checkpoint.load(S)
    other, fresh = tmp_path / "other.safetensors", tmp_path / "fresh.safetensors"
    header = dataclasses.replace(loaded.header, base=loaded.header.base | {"family": "sd15"})
    checkpoint.save(other, loaded.network, header)
    message = refused(capsys, "weights", "--hypernetwork", other, "--prompts", prompt_file)
    assert str(other) in message
    assert "family 'sd15'" in message
    for matrix in loaded.network.b_aux:
        matrix.zero_()
    checkpoint.save(fresh, loaded.network, loaded.header)
    message = refused(capsys, "weights", "--hypernetwork", fresh, "--prompts", prompt_file)
    assert "weights of zero" in message
    with pytest.raises(HyperAlignError, match="Name one that was trained"):
        check_not_zero(loaded)


def test_an_unknown_word_is_refused_before_sampling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("a red heart\na blue heart\na zeppelin\n")
    assert "zeppelin" in refused(
        capsys, "weights", "--hypernetwork", S, "--prompts", words, "--out", tmp_path / "out"
    )


def test_a_recipe_without_a_list_takes_its_validation_prompts(tmp_path: Path) -> None:
    listed = tmp_path / "validation.txt"
    listed.write_text("one\ntwo\nthree\nfour\n")
    options = analyse.Weights(recipe=RECIPE, hypernetwork=S, count=3)
    config = TrainConfig(
        model=ModelConfig(base="sd15"), validation=ValidationConfig(prompts=listed, prompt_count=4)
    )
    drawn = analyse.chosen_prompts(options, config, 3)
    assert len(set(drawn)) == 3
    assert set(drawn) < {"one", "two", "three", "four"}
    assert analyse.chosen_prompts(options, config, 3) == drawn
    every = dataclasses.replace(options, count=0)
    assert analyse.chosen_prompts(every, config, 3) == ["one", "two", "three", "four"]
    tiny = analyse.chosen_prompts(every, TrainConfig(), 3)
    assert len(tiny) == analyse.TINY_PROMPTS


def test_prompts_of_t5_are_all_padded_to_its_longest_length() -> None:
    assert analyse.one_padding(TrainConfig()).data.text_lengths == (512,)


def test_an_interrupted_figure_leaves_the_old_one(tmp_path: Path) -> None:
    class Broken:
        def savefig(self, path: Path, **_: Any) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    figure: Any = Broken()
    with pytest.raises(HyperAlignError, match="cannot be written.*Free the disk"):
        analyse.write(tmp_path / "figure", {"a": 1}, figure)
    assert path.read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["figure.json", "figure.png"]
    with pytest.raises(OSError, match="No space"):
        plots.save(figure, path)
