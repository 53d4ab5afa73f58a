"""Pairs: each preferred image comes with the one it won against, from the dataset to a batch."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from tiny_runs import of_method
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.tiny.prompts import content_of
from train.config import DataConfig
from train.data.encoding import encode_dataset
from train.data.preference import open_dataset
from train.data.preference.dataset import BadImage, DatasetItem, ImageFile
from train.data.shards import LatentShards
from train.data.streams import PreferenceShards
from train.inputs import load_inputs
from train.models.image_encoder import ImageEncoder, image_encoder
from train.tiny.dataset import preference_latents, rejected_latents

ROOT = Path(__file__).resolve().parents[2]
RED, BLUE = (220, 30, 30), (30, 30, 220)
FOLDER: dict[str, Callable[[Path], Path]] = {}
"""By kind, writes a dataset with a pair that red won, one that blue won and, where there are any, a tie."""


def image(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def pickapic(folder: Path) -> Path:
    rows = [
        {"caption": name, "jpg_0": image(RED), "jpg_1": image(BLUE), "label_0": label}
        for name, label in (("red won", 1.0), ("blue won", 0.0), ("tie", 0.5))
    ]
    return parquet(folder / "train.parquet", rows)


def chosen(folder: Path) -> Path:
    rows = [
        {"caption": "red won", "chosen": image(RED), "rejected": image(BLUE)},
        {"caption": "blue won", "chosen": image(BLUE), "rejected": image(RED)},
    ]
    return parquet(folder / "pairs.parquet", rows)


def tars(folder: Path) -> Path:
    path = folder / "train.tar"
    with tarfile.open(path, "w") as tar:
        for key, name, label in (("a", "red won", "1"), ("b", "blue won", "0"), ("c", "tie", "0.5")):
            members = {
                f"{key}.jpg_0.jpg": image(RED), f"{key}.jpg_1.jpg": image(BLUE),
                f"{key}.label_0.txt": label.encode(), f"{key}.original_prompt.txt": name.encode(),
            }  # fmt: skip
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def files(folder: Path) -> None:
    (folder / "red.png").write_bytes(image(RED))
    (folder / "blue.png").write_bytes(image(BLUE))


def jsonl(folder: Path) -> Path:
    files(folder)
    rows = [
        {"image": "red.png", "rejected": "blue.png", "caption": "red won"},
        {"image": "blue.png", "rejected": "red.png", "caption": "blue won"},
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "pairs.jsonl"


def hpd_v2(folder: Path) -> Path:
    files(folder)
    rows = [
        {"prompt": name, "file_path": ["red.png", "blue.png"], "human_preference": votes}
        for name, votes in (("red won", [1, 0]), ("blue won", [0, 1]), ("tie", [0, 0]))
    ]
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def hpd_v3(folder: Path) -> Path:
    files(folder)
    rows = [
        {"prompt": "red won", "path1": "red.png", "path2": "blue.png", "choice_dist": [9, 1]},
        {"prompt": "blue won", "path1": "blue.png", "path2": "red.png"},
        {"prompt": "tie", "path1": "blue.png", "path2": "red.png", "choice_dist": [5, 5]},
    ]
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def hpd_tar(folder: Path) -> Path:
    hpd_v2(folder)
    with tarfile.open(folder / "train.tar", "w") as tar:
        for name in ("red.png", "blue.png"):
            tar.add(folder / name, f"train/{name}")
            (folder / name).unlink()
    return folder


def colour(data: bytes | None) -> str:
    assert data is not None
    pixel: Any = Image.open(io.BytesIO(data)).convert("RGB").getpixel((8, 8))
    return "red" if pixel[0] > pixel[2] else "blue"


def items(path: Path, pairs: bool = True) -> list[DatasetItem]:
    dataset = open_dataset("auto", path, pairs=pairs)
    return [item for unit in range(dataset.units()) for item in dataset.read(unit)]


@pytest.mark.parametrize("write", [pickapic, chosen, tars, jsonl, hpd_v2, hpd_v3, hpd_tar])
def test_every_reader_gives_both_images_of_a_pair(write: Callable[[Path], Path], tmp_path: Path) -> None:
    found = items(write(tmp_path))
    assert [item.caption for item in found if isinstance(item, ImageFile)] == ["red won", "blue won"]
    for item in found:
        assert isinstance(item, ImageFile)
        assert (colour(item.data), colour(item.rejected)) == (
            item.caption.split()[0],
            {"red won": "blue"}.get(item.caption, "red"),
        )
    assert all(
        isinstance(item, ImageFile) and item.rejected is None for item in items(write(tmp_path), False)
    )


def test_hpd_lists_every_pair_of_an_image_that_won_several(tmp_path: Path) -> None:
    files(tmp_path)
    (tmp_path / "green.png").write_bytes(image((30, 220, 30)))
    rows = [
        {"prompt": "p", "file_path": ["red.png", other], "human_preference": [1, 0]}
        for other in ("blue.png", "green.png")
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    assert len(items(tmp_path)) == 2
    assert len({item.name for item in items(tmp_path)}) == 2
    assert len(items(tmp_path, pairs=False)) == 1


def test_what_has_no_rejected_images_is_refused(tmp_path: Path) -> None:
    files(tmp_path)
    (tmp_path / "red.txt").write_text("a red square", encoding="utf-8")
    with pytest.raises(HyperAlignError, match="folder of single images; pairs need the image that each won"):
        open_dataset("folder", tmp_path, pairs=True)
    parquet(tmp_path / "single.parquet", [{"caption": "a", "image": image(RED)}])
    with pytest.raises(HyperAlignError, match="pairs need the image that lost in one of rejected"):
        open_dataset("auto", tmp_path / "single.parquet", pairs=True)
    (tmp_path / "single.jsonl").write_text('{"image": "red.png", "caption": "a"}', encoding="utf-8")
    with pytest.raises(HyperAlignError, match="has no 'rejected'"):
        open_dataset("auto", tmp_path / "single.jsonl", pairs=True)


def test_ties_alone_are_no_pairs(tmp_path: Path) -> None:
    files(tmp_path)
    rows = [{"prompt": "tie", "file_path": ["red.png", "blue.png"], "human_preference": [0, 0]}]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(HyperAlignError, match="no pair with one preference image"):
        open_dataset("auto", tmp_path, pairs=True)
    row = {"caption": "tie", "jpg_0": image(RED), "jpg_1": image(BLUE), "label_0": 0.5}
    out = tmp_path / "out"
    encode_dataset(
        open_dataset("auto", parquet(tmp_path / "ties.parquet", [row]), pairs=True), POOLING, out, pairs=True
    )
    with pytest.raises(HyperAlignError, match="holds no encoded image"):
        LatentShards(out, "pooling", 64)


def test_a_rejected_image_that_is_missing_makes_the_pair_bad(tmp_path: Path) -> None:
    row = {"caption": "a", "jpg_0": image(RED), "jpg_1": None, "label_0": 1.0}
    assert items(parquet(tmp_path / "a.parquet", [row])) == [BadImage("a.parquet:0:0", "its jpg_1 is null")]
    path = jsonl(tmp_path)
    (tmp_path / "blue.png").unlink()
    assert all(
        isinstance(item, BadImage) and "blue.png cannot be read" in item.reason for item in items(path)
    )


# Encoding


def pool(images_BCHW: Tensor) -> Tensor:
    small = F.avg_pool2d(images_BCHW, 4)
    return torch.cat([small, small.mean(1, keepdim=True)], 1)


POOLING = ImageEncoder(64, "pooling", pool)


def test_both_images_are_encoded_in_the_preferred_ones_size(tmp_path: Path) -> None:
    rows = [
        {"caption": "red won", "chosen": image(RED, (96, 64)), "rejected": image(BLUE, (64, 96))},
        {"caption": "blue won", "chosen": image(BLUE), "rejected": image(RED)},
    ]
    dataset = open_dataset("auto", parquet(tmp_path / "pairs.parquet", rows), pairs=True)
    out = tmp_path / "out"
    encode_dataset(dataset, POOLING, out, buckets=[(64, 64), (64, 96)], pairs=True)
    shards = LatentShards(out, "pooling", 64)
    shards.check_pairs()
    assert shards.shapes == {(64, 64): (4, 16, 16), (64, 96): (4, 16, 24)}
    for index in range(2):
        preferred, rejected, (caption,) = shards.read_pairs([index])
        assert preferred.shape == rejected.shape
        red_won = caption == "red won"
        assert (preferred[0, 0].mean() > preferred[0, 2].mean()) == red_won
        assert (rejected[0, 0].mean() > rejected[0, 2].mean()) != red_won
    assert [tuple(shards.read([n])[0].shape[1:]) for n in range(2)] == [(4, 16, 16), (4, 16, 24)]


def test_shards_of_single_images_are_refused_where_pairs_are_read(tmp_path: Path) -> None:
    path, out = chosen(tmp_path), tmp_path / "out"
    encode_dataset(open_dataset("auto", path), POOLING, out)
    with pytest.raises(HyperAlignError, match=r"without the ones that they won against.*--pairs"):
        LatentShards(out, "pooling", 64).check_pairs()
    with pytest.raises(HyperAlignError, match="holds single images, not pairs"):
        encode_dataset(open_dataset("auto", path, pairs=True), POOLING, out, pairs=True)


def test_a_stream_of_pairs_is_in_the_order_of_its_images(tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode_dataset(open_dataset("auto", chosen(tmp_path), pairs=True), POOLING, out, pairs=True)
    stream: Any = PreferenceShards(LatentShards(out, "pooling", 64), seed=3)
    preferred, rejected, captions = stream.pairs(5, 4, None, slice(1, 3))
    alone, same_captions = stream.batch(5, 4, None, slice(1, 3))
    assert captions == same_captions
    assert torch.equal(preferred, alone)
    assert preferred.dtype == rejected.dtype == torch.float32


# The embedded model's own pairs


def test_a_rejected_scene_is_another_content_or_another_style(tmp_path: Path) -> None:
    base = load_tiny()
    config = DataConfig(scenes=24, cache=ROOT / "build" / "tiny")
    scenes = preference_latents(base, config)
    rejected = rejected_latents(base, config, scenes.captions)
    assert rejected.shape == scenes.latents.shape
    away = (rejected - scenes.latents).flatten(1).norm(dim=1)
    assert float(away.min()) > 1.0
    assert all(content_of(caption) for caption in scenes.captions)
    assert torch.equal(rejected_latents(base, config, scenes.captions), rejected)


@pytest.mark.parametrize("pairs", [True, False])
def test_a_run_on_the_embedded_model_compares_the_pairs_of_its_shards(tmp_path: Path, pairs: bool) -> None:
    config = of_method("dpo", tmp_path / "run")
    encoder = image_encoder(config, torch.device("cpu"))
    rows = [{"caption": "a red heart", "chosen": image(RED), "rejected": image(BLUE)}] * 2
    source = open_dataset("auto", parquet(tmp_path / "pairs.parquet", rows), pairs=pairs)
    encode_dataset(source, encoder, tmp_path / "shards", pairs=pairs)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, preference=tmp_path / "shards")
    )
    if not pairs:
        with pytest.raises(HyperAlignError, match="without the ones that they won against"):
            load_inputs(config, Accelerator(cpu=True))
        return
    stream: Any = load_inputs(config, Accelerator(cpu=True)).pairs
    _, _, captions = stream.pairs(0, 2, None, slice(None))
    assert captions == ["a red heart"] * 2
