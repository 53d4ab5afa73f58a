"""Images of any shape train in their own: buckets, batches of one of them, and a step with such a batch."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from hyperalign.errors import HyperAlignError
from train.data.buckets import Bucket, buckets_of, enlargement, nearest_bucket
from train.data.encoding import Counts, PreparedImage, encode_dataset, prepare
from train.data.order import ImageOrder
from train.data.preference import FirstImages, open_dataset
from train.data.preference.dataset import ImageFile, PreferenceDataset
from train.data.shards import LatentShards, ShardHeader, shard_path, write_shard
from train.data.streams import PreferenceShards
from train.encode import Options, summary
from train.models.architectures import ModelSize, architecture, autoencoder
from train.models.autoencoder import Autoencoder
from train.models.flux import Flux
from train.models.image_encoder import ImageEncoder
from train.models.stable_diffusion import StableDiffusion

POOLING = ImageEncoder(64, "pooling", lambda images_BCHW: F.avg_pool2d(images_BCHW, 4))
SHAPES: list[Bucket] = [(64, 64), (48, 80), (80, 48)]


def picture(height: int, width: int) -> ImageFile:
    """Returns an image that is green in its middle and red at its rim."""
    image, rim = Image.new("RGB", (width, height), (255, 0, 0)), min(height, width) // 4
    image.paste((0, 255, 0), (rim, rim, width - rim, height - rim))
    file = io.BytesIO()
    image.save(file, "PNG")
    return ImageFile("a", file.getvalue(), f"{height} x {width}")


def write_images(folder: Path, sizes: list[Bucket]) -> PreferenceDataset:
    folder.mkdir(parents=True)
    rows: list[str] = []
    for number, size in enumerate(sizes):
        (folder / f"{number}.png").write_bytes(picture(*size).data)
        rows.append(json.dumps({"image": f"{number}.png", "caption": f"image {number}"}))
    (folder / "list.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return open_dataset("jsonl", folder / "list.jsonl")


# Buckets


def test_the_buckets_of_1024_are_those_of_sdxl_up_to_one_to_two() -> None:
    tall = [(1408, 704), (1344, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 832), (1152, 896),
            (1088, 896), (1088, 960), (1024, 960)]  # fmt: skip
    expected = {(1024, 1024), *tall, *((width, height) for height, width in tall)}
    assert set(buckets_of(1024)) == expected
    assert set(buckets_of(512)) == {(512, 512), (448, 576), (576, 448), (384, 640), (640, 384)}
    assert buckets_of(64) == [(64, 64)]


@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
def test_no_bucket_has_a_nearer_ratio_and_no_image_fails_to_cover_its_own(height: int, width: int) -> None:
    buckets = buckets_of(1024)
    bucket = nearest_bucket(height, width, buckets)
    turned = nearest_bucket(width, height, buckets)
    assert turned == (bucket[1], bucket[0])
    factor = enlargement(height, width, bucket)
    assert factor * height >= bucket[0] - 1e-6
    assert factor * width >= bucket[1] - 1e-6
    distances = [abs(np.log(height / width) - np.log(b[0] / b[1])) for b in buckets]
    assert distances[buckets.index(bucket)] <= min(distances) + 1e-9


@pytest.mark.parametrize("size", [(70, 110), (110, 70), (200, 210), (64, 64), (20, 300)])
def test_an_image_covers_its_bucket_and_is_cropped_in_the_middle(size: Bucket) -> None:
    found = prepare(picture(*size), 64, 0, SHAPES)
    assert isinstance(found, PreparedImage)
    assert found.bucket == nearest_bucket(*size, SHAPES)
    red = (found.pixels_HWC[..., 0] > 128)[10:-10].mean(axis=1), (found.pixels_HWC[..., 0] > 128).mean(axis=0)
    for shares in red:  # as much of it on either side
        assert np.abs(shares - shares[::-1]).max() < 0.1


def test_images_that_their_bucket_would_enlarge_are_left_out_or_counted(tmp_path: Path) -> None:
    # by the short side alone, 52 x 88 would be smaller than 64, and it covers 48 x 80
    dataset = write_images(tmp_path / "in", [(52, 88), (40, 66), (64, 64), (63, 64)])
    counts = encode_dataset(dataset, POOLING, tmp_path / "all", buckets=SHAPES)
    assert counts == Counts(units=1, images=4, enlarged=2)
    counts = encode_dataset(dataset, POOLING, tmp_path / "large", buckets=SHAPES, min_side=64)
    assert counts == Counts(units=1, images=2, too_small=2)
    assert LatentShards(tmp_path / "large").captions() == ["image 0", "image 2"]
    assert LatentShards(tmp_path / "large").sizes() == (
        "2 images (1 of 64 x 64, 1 of 80 x 48), 2 left out as smaller than 64"
    )
    options = Options(tmp_path, tmp_path / "in", tmp_path / "large", limit=9)
    assert summary(dataclasses.replace(counts, enlarged=3), options) == (
        f"Encoded 2 images of the first 9 of {tmp_path / 'in'} in this process to {tmp_path / 'large'}. "
        "Skipped: 2 too small. Enlarged: 3, which teaches blur; --min-side at the recipe's resolution leaves "
        "them out."
    )


# Shards


def test_a_shard_holds_every_bucket_and_its_rows_keep_their_captions(tmp_path: Path) -> None:
    sizes: list[Bucket] = [(64, 64), (48, 80), (64, 64), (80, 48), (48, 80), (48, 80)]
    dataset = write_images(tmp_path / "in", sizes)
    for out, batch in (("a", 1), ("b", 4)):
        encode_dataset(dataset, POOLING, tmp_path / out, buckets=SHAPES, batch=batch)
    names = [shard_path(tmp_path / out, 0) for out in ("a", "b")]
    assert names[0].read_bytes() == names[1].read_bytes()
    shards = LatentShards(tmp_path / "a")
    assert shards.shapes == {(48, 80): (3, 12, 20), (64, 64): (3, 16, 16), (80, 48): (3, 20, 12)}
    assert shards.read([0, 1, 2])[1] == ["image 1", "image 4", "image 5"]
    assert shards.read([5])[0].shape == (1, 3, 20, 12)
    assert shards.read([4])[1] == ["image 2"]


def test_shards_of_other_shapes_or_least_sizes_are_never_mixed_in(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "in", [(64, 64)])
    encode_dataset(dataset, POOLING, tmp_path / "out")
    with pytest.raises(HyperAlignError, match=r"has images cropped to squares .*, not images in buckets"):
        encode_dataset(dataset, POOLING, tmp_path / "out", buckets=SHAPES)
    with pytest.raises(HyperAlignError, match="leaves out images under 0, not 64. Choose another --out"):
        encode_dataset(dataset, POOLING, tmp_path / "out", min_side=64)


def test_shards_of_the_first_version_are_read_as_squares_and_not_made_again(tmp_path: Path) -> None:
    dataset = write_images(tmp_path / "in", [(64, 64), (64, 64)])
    header = {"captions": ["a", "b"], "names": ["0", "1"], "encoder": "pooling", "resolution": 64,
              "unit": "list.jsonl[0:2]", "unsafe": 0, "unsafe_mark": "", "version": 1}  # fmt: skip
    latents = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 16).contiguous()
    save_file({"latents": latents}, shard_path(tmp_path, 0), {"hyperalign_latents": json.dumps(header)})
    shards = LatentShards(tmp_path, "pooling", 64)
    assert (len(shards), shards.shapes) == (2, {(64, 64): (3, 16, 16)})
    found, captions = shards.read([1, 0])
    assert (found[:, 0, 0, 0].tolist(), captions) == ([1.0, 0.0], ["b", "a"])
    assert encode_dataset(dataset, POOLING, tmp_path, min_side=64).reused == 1
    with pytest.raises(HyperAlignError, match="not images in buckets"):
        encode_dataset(dataset, POOLING, tmp_path, buckets=SHAPES)


# Order


def order_of(*counts: list[int], window: int = 4) -> ImageOrder:
    return ImageOrder(np.array(counts, dtype=np.int64), window)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 9), st.integers(1, 3)), min_size=1, max_size=5
    ),
    count=st.integers(1, 12), seed=st.integers(0, 9),
)  # fmt: skip
def test_batches_have_one_bucket_and_an_epoch_has_every_image_once(
    counts: list[tuple[int, int, int]], count: int, seed: int
) -> None:
    order, epochs = order_of(*map(list, counts)), 3
    steps = order.total * epochs // count + 3
    batches = [order.batch(step * count, count, seed) for step in range(steps)]
    assert batches[::-1] == [order.batch(step * count, count, seed) for step in reversed(range(steps))]
    bucket = np.repeat(np.tile(np.arange(3), len(counts)), np.array(counts).reshape(-1))
    seen, uses = Counter[int](), [Counter[int]() for _ in range(3)]
    for batch in batches:
        assert len(batch) == count
        assert len({int(bucket[image]) for image in batch}) == 1
        uses[int(bucket[batch[0]])].update(batch)
        seen.update(batch)
    for images in uses:  # of a bucket, no image comes again before all others came
        assert not images or max(images.values()) - min(images.values()) <= 1
    each = np.array([seen[image] for image in range(order.total)])
    for b, size in enumerate(order.sizes_K.tolist()):  # and none is behind by more than a batch
        if size:
            assert abs(each[bucket == b].sum() - epochs * size) <= count * (len(order.sizes_K) + 3)


def test_an_epoch_mixes_the_buckets_and_differs_by_seed_and_epoch() -> None:
    order = order_of([100, 50], [100, 50])
    kinds = ["".join(str(i % 150 // 100) for i in order.batch(8 * n, 8, 0)[:1]) for n in range(36)]
    assert {kinds[i : i + 12].count("1") for i in range(0, 36, 12)} <= {3, 4, 5}
    first, again = ([order.batch(8 * n, 8, seed) for n in range(37)] for seed in (0, 1))
    assert first != again
    assert first != [order.batch(8 * (n + 37), 8, 0) for n in range(37)]


def test_one_bucket_alone_is_the_plain_stream() -> None:
    order = order_of([30], [20])
    plain = [*order.epoch(3, 0).tolist(), *order.epoch(3, 1).tolist()]
    assert order.batch(0, 100, 3) == plain
    assert order.batch(45, 10, 3) == plain[45:55]


def test_processes_get_parts_of_one_batch(tmp_path: Path) -> None:
    sizes = {(64, 64): 20, (48, 80): 9, (80, 48): 4}
    latents = {b: torch.full((n, 1, b[0] // 4, b[1] // 4), float(n)) for b, n in sorted(sizes.items())}
    texts = [f"{number}" for number in range(33)]
    write_shard(shard_path(tmp_path, 0), latents, ShardHeader(texts, texts, "vae", 64))
    images, rng = PreferenceShards(LatentShards(tmp_path), 5), np.random.default_rng(0)
    shapes: set[tuple[int, ...]] = set()
    for position in range(0, 48, 6):
        whole, captions = images.batch(position, 6, rng, slice(0, 6))
        parts = [images.batch(position, 6, rng, slice(3 * rank, 3 * rank + 3)) for rank in range(2)]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole)
        assert [text for part in parts for text in part[1]] == captions
        shapes.add(tuple(whole.shape[1:]))
    assert len(shapes) == 3


# Training


class WideImages:
    """Preference images of two shapes in turn."""

    def batch(
        self, position: int, count: int, rng: np.random.Generator, part: slice
    ) -> tuple[Tensor, list[str]]:
        shape = ((4, 2, 8), (4, 6, 4))[position // count % 2]
        latents = torch.randn(count, *shape, generator=torch.Generator().manual_seed(position))
        return latents[part], [f"image {n}" for n in range(count)[part]]


def test_a_step_trains_on_the_shape_of_its_batch(small_run: Callable[..., Any], tmp_path: Path) -> None:
    def losses(out: Path, steps: int) -> list[float]:
        run = small_run(out, optim={"steps": steps}, objective={"micro_batch": 2})
        run.inputs = dataclasses.replace(run.inputs, preference=WideImages())
        rows: list[dict[str, Any]] = []
        run.fit(rows.append)
        return [row["preference_loss"] for row in rows]

    found = losses(tmp_path / "a", 4)
    assert all(np.isfinite(loss) and loss > 0 for loss in found)
    assert found == losses(tmp_path / "b", 4)


def test_sdxl_is_told_the_size_of_the_bucket_and_flux_its_positions() -> None:
    with torch.device("meta"):
        images = Autoencoder(autoencoder("sdxl"))
        sdxl = StableDiffusion(architecture("sdxl", ModelSize(width_divisor=10)), images, 1024)
        size = ModelSize(double_blocks=5, single_blocks=1, width_divisor=12)
        flux = Flux(architecture("flux", size), Autoencoder(autoencoder("flux")), 1024)
    texts = {"prompt_embeds": torch.zeros(2, 77, 2048), "pooled_prompt_embeds": torch.zeros(2, 1280)}
    call = sdxl.call(torch.zeros(2, 4, 88, 168), torch.ones(2), texts)
    assert call["added_cond_kwargs"]["time_ids"].tolist() == [[704, 1344, 0, 0, 704, 1344]] * 2
    x, texts = torch.randn(2, 16, 88, 168), {**texts, "guidance": torch.ones(2)}
    call = flux.call(x, torch.ones(2), texts)
    ids = call["img_ids"]
    assert (len(ids), ids[-1].tolist()) == (44 * 84, [0, 43, 83])
    assert torch.equal(flux.prediction(call["hidden_states"], x), x)


# The first images of a source


def test_a_limit_takes_the_first_images_and_whole_units_stay(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(8, 8).data)
    rows = (json.dumps({"image": "a.png", "caption": str(i)}) for i in range(2500))
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    dataset = open_dataset("jsonl", tmp_path / "a.jsonl")
    first = FirstImages(dataset, 1200)
    assert [first.unit_name(unit) for unit in range(first.units())] == [
        "a.jsonl[0:1000]", "a.jsonl[1000:2000], the first 200",
    ]  # fmt: skip
    assert [len(list(first.read(unit))) for unit in (0, 1)] == [1000, 200]
    every = FirstImages(dataset, 9999)
    assert (every.units(), every.unit_name(2)) == (3, dataset.unit_name(2))
    with pytest.raises(HyperAlignError, match="--limit is 0; expected 1 or more images"):
        FirstImages(dataset, 0)
