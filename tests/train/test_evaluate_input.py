"""What `train/evaluate.py` refuses, in one sentence and before anything is scored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

from hyperalign.errors import HyperAlignError
from hyperalign.image_sets import RunRecord, Settings, write_metadata, write_record
from train import evaluate
from train.evaluation.scorers import Scorer, diversity_scorer
from train.evaluation.scoring import Unit, Work, values_of
from train.models.image_embedding import load_encoder

PROMPTS = ["a red circle", "a blue square"]
SETTINGS = Settings(
    base="tiny", base_files="", method="base", method_file="", method_sha256="", options={}, steps=4,
    guidance_scale=1.0, width=8, height=8, seed=0, images_per_prompt=2, prompts=2, prompts_sha256="",
)  # fmt: skip


def write_set(folder: Path, prompts: list[str] = PROMPTS, seeds: int = 2) -> Path:
    write_metadata(folder, [{"prompt": prompt} for prompt in prompts])
    for number in range(len(prompts)):
        (folder / f"{number:05d}/samples").mkdir()
        for seed in range(seeds):
            Image.new("RGB", (8, 8), (9 * number, 0, 9 * seed)).save(sample(folder, number, seed))
    return folder


def sample(folder: Path, number: int, seed: int) -> Path:
    return folder / f"{number:05d}/samples/{seed:04d}.png"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_set(tmp_path / "base")


@pytest.fixture
def refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command and returns its one line of error, having seen that nothing was scored."""

    def run(*more: str, sets: list[str] | None = None, rewards: tuple[str, ...] = ("tiny reward",)) -> str:
        named = sets or [f"base={base}", f"s={tmp_path / 's'}"]
        out = ["--out", str(tmp_path / "out"), "--cpu"]
        status = evaluate.main(["--sets", *named, *out, "--rewards", *rewards, *more])
        assert status == 2
        assert not (tmp_path / "out" / "values").exists()
        [line] = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
        return line

    return run


@pytest.mark.parametrize(
    ("text", "said"),
    [("images", "NAME=FOLDER"), ("s=", "NAME=FOLDER"), ("=x", "NAME=FOLDER"), ("s=missing", "no folder")],
)
def test_a_set_is_a_name_and_a_folder(refused: Any, base: Path, text: str, said: str) -> None:
    assert said in refused(sets=[f"base={base}", text])


def test_a_name_or_folder_that_is_given_twice(refused: Any, base: Path) -> None:
    assert "names 'base' twice" in refused(sets=[f"base={base}", f"base={base}"])
    assert f"the folder {base} twice" in refused(sets=[f"base={base}", f"s={base}"])


def test_a_folder_that_lacks_images_of_some_prompts(refused: Any, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "s")
    sample(folder, 1, 0).unlink()
    assert "lacks images of 1 of 2 prompts (00001): 3 of 4" in refused()


def test_other_prompts_another_number_of_them_and_other_seeds(
    refused: Any, base: Path, tmp_path: Path
) -> None:
    write_set(tmp_path / "words", ["a red circle", "a red square"])
    assert "'a blue square' in" in refused(sets=[f"base={base}", f"s={tmp_path / 'words'}"])
    write_set(tmp_path / "more", [*PROMPTS, "a dog"])
    assert "has 2 prompts and" in refused(sets=[f"base={base}", f"s={tmp_path / 'more'}"])
    write_set(tmp_path / "few", seeds=1)
    assert "has 2 images of each prompt and" in refused(sets=[f"base={base}", f"s={tmp_path / 'few'}"])
    other = write_set(tmp_path / "other")
    write_record(base, RunRecord(SETTINGS, complete=True))
    write_record(other, RunRecord(dataclasses.replace(SETTINGS, seed=7), complete=True))
    said = refused(sets=[f"base={base}", f"s={other}"])
    assert "begin at 0" in said and "at 7" in said


def test_a_run_that_has_not_finished(refused: Any, tmp_path: Path) -> None:
    write_record(write_set(tmp_path / "s"), RunRecord(SETTINGS))
    assert "has not finished" in refused()


def test_an_unreadable_image_is_named(refused: Any, tmp_path: Path) -> None:
    file = sample(write_set(tmp_path / "s"), 1, 1)
    file.write_bytes(file.read_bytes()[:45])  # within its pixels
    said = refused()
    assert f"1 of 8 images cannot be used: {file}" in said and "makes only what is missing" in said


def test_unknown_and_repeated_rewards(refused: Any, tmp_path: Path) -> None:
    write_set(tmp_path / "s")
    assert "no reward 'beauty'" in refused(rewards=("beauty",))
    assert "give each of them once" in refused(rewards=("tiny reward", "tiny reward"))


def test_missing_weights_of_rewards_geneval_and_encoder(refused: Any, tmp_path: Path) -> None:
    write_set(tmp_path / "s")
    weights = ("--weights", str(tmp_path))
    assert "HPS_v2.1_compressed.pt" in refused(*weights, rewards=("hpsv2.1",))
    assert "has no config.json" in refused("--diversity-encoder", str(tmp_path))
    for folder in (tmp_path / "base", tmp_path / "s"):
        for number in range(2):
            include = [{"class": "dog", "count": 1}]
            line = {"tag": "single_object", "prompt": "a dog", "include": include}
            (folder / f"{number:05d}/metadata.jsonl").write_text(json.dumps(line))
    assert "--geneval none leaves" in refused(*weights, "--geneval", "official")


def test_prompts_that_a_scorer_cannot_read(refused: Any, base: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "s", ["a red circle", "a giraffe"])
    write_set(tmp_path / "b", ["a red circle", "a giraffe"])
    sets = [f"b={tmp_path / 'b'}", f"s={tmp_path / 's'}"]
    assert "'giraffe'" in refused(sets=sets)
    assert "evaluation_metadata.jsonl" in refused("--geneval", "official", sets=[f"base={base}"])


def test_numbers_below_one_and_a_folder_that_cannot_be_written(refused: Any, tmp_path: Path) -> None:
    write_set(tmp_path / "s")
    assert "--batch is 0" in refused("--batch", "0")
    (tmp_path / "out").write_text("a file")
    assert "cannot be written" in refused()


def values(base: Path, scorer: Scorer, batch: int = 4) -> list[float]:
    paths = [sample(base, 0, seed) for seed in range(2)]
    units = [Unit((path,), {"prompt": "a red circle"}) for path in paths]
    work = Work(Accelerator(cpu=True), base / "values", batch, 1)
    return values_of(scorer, units, {path: path.name for path in paths}, work)


@pytest.mark.parametrize(("batch", "fix"), [(4, "Lower --batch from 4 to 2"), (1, "add --cpu")])
def test_a_gpu_that_is_too_small_names_the_option_to_lower(base: Path, batch: int, fix: str) -> None:
    def load(device: torch.device) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(HyperAlignError, match=fix) as caught:
        values(base, Scorer("huge", "0", load), batch)
    assert "2.00 GiB" in str(caught.value)


def test_a_score_that_is_no_number_names_its_image_and_is_not_kept(base: Path) -> None:
    scorer = Scorer("broken", "0", lambda device: lambda images, lines: [0.5, float("nan")])
    with pytest.raises(HyperAlignError, match="0001.png"):
        values(base, scorer)
    assert values(base, Scorer("broken", "0", lambda device: lambda images, lines: [1.0, 2.0])) == [1.0, 2.0]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 with random weights, in transformers' layout."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    preprocessing = {
        "size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def test_diversity_is_measured_by_the_encoder_that_is_given(encoder: Path, tmp_path: Path) -> None:
    from transformers import Dinov2Model

    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    work = Work(Accelerator(cpu=True), tmp_path / "values", 4, 1)
    unit = Unit(tuple(paths), {"prompt": "a red circle"})
    [value] = values_of(diversity_scorer(encoder), [unit], {path: path.name for path in paths}, work)
    model: Any = Dinov2Model.from_pretrained(encoder)
    pixels = (images[:, :, 2:30, 2:30].float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        rows = torch.nn.functional.normalize(model.eval()(pixels).pooler_output, dim=-1)
    cosines = [float(rows[i] @ rows[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert value == pytest.approx(1 - sum(cosines) / 3, abs=1e-4)


def test_an_encoder_of_another_kind_or_damaged_is_refused(encoder: Path, tmp_path: Path) -> None:
    from transformers import BertConfig

    (tmp_path / "preprocessor_config.json").write_bytes((encoder / "preprocessor_config.json").read_bytes())
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HyperAlignError, match="cannot be loaded"):
        load_encoder(tmp_path, torch.device("cpu"))
    BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    ).save_pretrained(tmp_path)
    with pytest.raises(HyperAlignError, match="does not take images"):
        load_encoder(tmp_path, torch.device("cpu"))
    (tmp_path / "preprocessor_config.json").write_text('{"size": 3}')
    with pytest.raises(HyperAlignError, match="crop_size"):
        load_encoder(tmp_path, torch.device("cpu"))
