"""How many bad images an encoding may skip: counted to its end and over all runs of one folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch.nn.functional as F
from PIL import Image

from hyperalign.errors import HyperAlignError
from train.data.bad_images import BAD_FILE
from train.data.encoding import Counts, encode_dataset
from train.data.preference import open_dataset
from train.data.preference.dataset import PreferenceDataset
from train.data.shards import LatentShards, shard_path
from train.encode import main
from train.models.image_encoder import ImageEncoder

RECIPE = Path(__file__).parents[2] / "train" / "recipes" / "tiny_s.toml"


POOLING = ImageEncoder(64, "pooling", lambda images_BCHW: F.avg_pool2d(images_BCHW, 4))
"""A fast encoder: the colours at a fourth of the side."""


def write_list(folder: Path, count: int, bad: int) -> PreferenceDataset:
    """Returns a JSONL dataset whose last `bad` images are rubbish."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        if i < count - bad:
            Image.new("RGB", (64, 64), (i, 255 - i, 0)).save(folder / f"{i}.jpg")
        else:
            (folder / f"{i}.jpg").write_bytes(b"rubbish")
    rows = [json.dumps({"image": f"{i}.jpg", "caption": f"scene {i}"}) for i in range(count)]
    (folder / "list.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return open_dataset("jsonl", folder / "list.jsonl")


def command(tmp_path: Path) -> int:
    dataset, out = str(tmp_path / "in" / "list.jsonl"), str(tmp_path / "out")
    return main(["--recipe", str(RECIPE), "--source", dataset, "--out", out])


def test_a_few_images_that_are_mostly_bad_stop_the_command_and_the_shards_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_list(tmp_path / "in", 60, bad=57)
    assert command(tmp_path) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "error: 57 of 60 images are bad; at most 1 % may be. The last is list.jsonl:60" in said
    assert len(LatentShards(tmp_path / "out")) == 3


def test_one_bad_image_among_few_is_skipped(tmp_path: Path) -> None:
    assert encode_dataset(write_list(tmp_path / "in", 20, bad=1), POOLING, tmp_path / "out").bad == 1
    with pytest.raises(HyperAlignError, match="2 of 20 images are bad"):
        encode_dataset(write_list(tmp_path / "in", 20, bad=2), POOLING, tmp_path / "other")


def test_running_again_does_not_forget_the_bad_images_of_finished_shards(tmp_path: Path) -> None:
    dataset, out = write_list(tmp_path / "in", 60, bad=57), tmp_path / "out"
    for _ in range(2):
        with pytest.raises(HyperAlignError, match="57 of 60 images are bad"):
            encode_dataset(dataset, POOLING, out)
    with (out / BAD_FILE).open("a") as file:
        file.write('{"unit": 0, "na')  # a process was killed
    with pytest.raises(HyperAlignError, match="57 of 60 images are bad"):
        encode_dataset(dataset, POOLING, out)


def test_repaired_images_are_encoded_as_the_message_says(tmp_path: Path) -> None:
    dataset, out = write_list(tmp_path / "in", 20, bad=5), tmp_path / "out"
    with pytest.raises(HyperAlignError, match="delete that file and the shards of these units"):
        encode_dataset(dataset, POOLING, out)
    units = {json.loads(line)["unit"] for line in (out / BAD_FILE).read_text().splitlines()}
    for number in range(15, 20):
        shutil.copy(tmp_path / "in" / "0.jpg", tmp_path / "in" / f"{number}.jpg")
    assert units == {0}
    shard_path(out, 0).unlink()
    dataset = open_dataset("jsonl", tmp_path / "in" / "list.jsonl")
    assert encode_dataset(dataset, POOLING, out) == Counts(units=1, images=20)
    # Although bad.jsonl still lists them, they are in the shard now.
    assert encode_dataset(dataset, POOLING, out) == Counts(units=1, reused=1)
