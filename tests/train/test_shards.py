"""Latent shards: one shuffled stream for any number of processes, and damaged shards."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError
from train.data.shards import LatentShards, ShardHeader, read_shard_header, shard_path, write_shard
from train.models.image_encoder import latent_fingerprint

SHAPE, SIDES = (4, 2, 2), (16, 16)


def make(folder: Path, *counts: int, encoder: str = "vae", resolution: int = 16, first: int = 0) -> Path:
    """Writes shards whose latents and captions contain the index of the image."""
    row = 0
    for number, count in enumerate(counts, first):
        latents = torch.arange(row, row + count).view(-1, 1, 1, 1).expand(-1, *SHAPE).half()
        texts = [f"row {row + i}" for i in range(count)]
        header = ShardHeader(texts, texts, encoder, resolution, f"unit {number}")
        write_shard(shard_path(folder, number), {SIDES: latents} if count else {}, header)
        row += count
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> LatentShards:
    return LatentShards(make(tmp_path_factory.mktemp("shards"), *[30] * 20, 0, 7))


def test_rows_come_with_their_captions(shards: LatentShards) -> None:
    rows = [606, 0, 29, 30, 606]
    latents, captions = shards.read(rows)
    assert (len(shards), shards.shapes, latents.dtype) == (607, {SIDES: SHAPE}, torch.float16)
    assert latents[:, 0, 0, 0].tolist() == rows
    assert captions == [f"row {row}" for row in rows]


def test_each_caption_is_returned_once(shards: LatentShards, tmp_path: Path) -> None:
    assert shards.captions() == [f"row {row}" for row in range(607)]
    header = ShardHeader(["a", "b", "a"], [""] * 3, "vae", 16)
    write_shard(shard_path(tmp_path, 0), {SIDES: torch.zeros(3, *SHAPE)}, header)
    assert LatentShards(tmp_path).captions() == ["a", "b"]


def test_an_epoch_is_a_permutation_that_differs_by_epoch_and_seed(shards: LatentShards) -> None:
    epoch = shards.images.epoch
    order = epoch(3, 0)
    assert sorted(order.tolist()) == list(range(607))
    assert (order == epoch(3, 0)).all()
    for other in (epoch(3, 1), epoch(4, 0)):
        assert (order != other).mean() > 0.9


def test_any_stretch_of_the_order_touches_few_shards_and_mixes_them(shards: LatentShards) -> None:
    ends = np.cumsum(shards.images.counts_SK.sum(axis=1))
    shard_of = np.searchsorted(ends, shards.images.epoch(0, 0), side="right")
    touched = [len(set(shard_of[i : i + 30].tolist())) for i in range(60, 500, 30)]
    assert max(touched) <= shards.images.window + 3
    assert min(touched) >= 3


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 2000), sizes=st.lists(st.integers(1, 700), min_size=1, max_size=4))
def test_the_stream_needs_its_position_only(shards: LatentShards, position: int, sizes: list[int]) -> None:
    parts: list[int] = []
    for size in sizes:
        parts += shards.batch(position + len(parts), size, seed=5)
    assert parts == shards.batch(position, sum(sizes), seed=5)


def test_the_stream_is_one_epoch_after_the_other(shards: LatentShards) -> None:
    stream = shards.batch(0, 3 * 607, seed=1)
    for epoch in range(3):
        assert stream[epoch * 607 : (epoch + 1) * 607] == shards.images.epoch(1, epoch).tolist()


def test_the_index_is_saved_and_follows_the_shards(tmp_path: Path) -> None:
    make(tmp_path, 5, 6)
    assert len(LatentShards(tmp_path)) == 11
    written = (tmp_path / "index.json").stat().st_mtime_ns
    assert len(LatentShards(tmp_path)) == 11
    assert (tmp_path / "index.json").stat().st_mtime_ns == written
    make(tmp_path, 9, first=2)
    shard_path(tmp_path, 0).unlink()
    assert len(LatentShards(tmp_path)) == 15
    assert list(json.loads((tmp_path / "index.json").read_text())) == [
        shard_path(tmp_path, number).name for number in (1, 2)
    ]
    for rubbish in ("{", "[]", '{"shard-000001.safetensors": {"x": 1}}'):
        (tmp_path / "index.json").write_text(rubbish)
        assert len(LatentShards(tmp_path)) == 15


def test_one_broken_shard_in_a_hundred_is_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, *[1] * 100)
    broken = shard_path(tmp_path, 42)
    broken.write_bytes(broken.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        shards = LatentShards(tmp_path)
    assert len(shards) == 99
    assert list(shards.damaged) == [broken.name]
    assert broken.name in caplog.text
    shard_path(tmp_path, 43).write_bytes(b"")
    with pytest.raises(HyperAlignError, match=r"2 of 100 shards in .* are damaged, first shard-000042"):
        LatentShards(tmp_path)


def test_a_shard_that_breaks_during_a_run_is_replaced_until_it_is_too_much(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = LatentShards(make(tmp_path, 500, 5))
    shard_path(tmp_path, 1).write_bytes(b"rubbish")
    with caplog.at_level(logging.WARNING):
        latents, captions = shards.read([0, 501, 2, *range(200)])
    assert captions[:3] == ["row 0", "row 2", "row 2"]  # of the good rows, the one at its place
    assert latents[1, 0, 0, 0] == 2
    assert shard_path(tmp_path, 1).name in caplog.text
    with pytest.raises(HyperAlignError, match=r"4 of 206 images could not be read"):
        shards.read([502, 503, 504])


def test_latents_that_are_not_finite_count_as_broken(tmp_path: Path) -> None:
    latents = torch.zeros(3, *SHAPE, dtype=torch.bfloat16)
    latents[1, 0, 0, 0] = torch.nan
    header = ShardHeader(["a", "b", "c"], ["", "", ""], "vae", 16)
    write_shard(shard_path(tmp_path, 0), {SIDES: latents}, header)
    shards = LatentShards(tmp_path)
    assert shards.read([1, 2])[1] == ["c", "c"]
    with pytest.raises(HyperAlignError, match="2 of 3 images"):
        shards.read([1])


def test_shards_of_another_encoder_resolution_or_shape_are_refused(tmp_path: Path) -> None:
    make(tmp_path, 5)
    assert LatentShards(tmp_path, "vae", 16).fingerprint == "vae"
    with pytest.raises(HyperAlignError, match="is encoded by vae; expected sdxl-vae. Encode the images"):
        LatentShards(tmp_path, "sdxl-vae")
    with pytest.raises(HyperAlignError, match="is of images with a side of 16; expected 1024"):
        LatentShards(tmp_path, resolution=1024)
    other = ShardHeader(["a"], ["a"], "vae", 16)
    write_shard(shard_path(tmp_path, 1), {SIDES: torch.zeros(1, 16, 2, 2)}, other)
    with pytest.raises(HyperAlignError, match=r"of the shape \(16, 2, 2\); expected \(4, 2, 2\)"):
        LatentShards(tmp_path)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HyperAlignError, match="There is no folder"):
        LatentShards(tmp_path / "none")
    with pytest.raises(HyperAlignError, match="holds no encoded image"):
        LatentShards(tmp_path)
    with pytest.raises(HyperAlignError, match="holds no encoded image"):
        LatentShards(make(tmp_path, 0, 0))


def test_a_shard_of_a_later_version_is_not_read(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 0)
    header = ShardHeader(["a"], ["a"], "vae", 16, version=3)
    write_shard(path, {SIDES: torch.zeros(1, *SHAPE)}, header)
    with pytest.raises(HyperAlignError, match="version 3 .* expected version 2"):
        read_shard_header(path)


def test_the_precision_of_a_run_does_not_decide_which_shards_it_reads() -> None:
    torch.manual_seed(0)
    module = torch.nn.Conv2d(3, 8, 3)
    full = latent_fingerprint(module, 0.18215, 0.0)
    assert latent_fingerprint(module.bfloat16(), 0.18215, 0.0) == full
    assert latent_fingerprint(torch.nn.Conv2d(3, 8, 3), 0.18215, 0.0) != full
    assert latent_fingerprint(module, 0.13025, 0.0) != full
