"""Thousands of images are encoded: interrupted, resumed, on several processes; bad images are skipped."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import resource
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_processes import in_processes, script
from PIL import Image, ImageDraw
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.tiny import load_tiny
from train.data.encoding import Counts, PreparedImage, encode_dataset, prepare
from train.data.preference import UnsafeFilter, open_dataset
from train.data.preference.dataset import BadImage, ImageFile, PreferenceDataset
from train.data.shards import LatentShards, shard_path
from train.encode import main, skipped
from train.models.image_encoder import ImageEncoder

ROOT = Path(__file__).resolve().parents[2]
ROWS, FILES, ROW_GROUP = 2400, 3, 100
TIES = 300


def pool(images_BCHW: Tensor) -> Tensor:
    """Returns the colours at a fourth of the side, and their mean."""
    small = F.avg_pool2d(images_BCHW, 4)
    return torch.cat([small, small.mean(1, keepdim=True)], 1)


POOLING = ImageEncoder(64, "pooling", pool)
"""A fast encoder."""


def jpeg(rng: np.random.Generator, side: int = 64) -> bytes:
    """Returns a disc of some colour on white."""
    image = Image.new("RGB", (side, side), "white")
    left, top, red, green, blue = rng.integers(0, [side // 2, side // 2, 256, 256, 256]).tolist()
    ImageDraw.Draw(image).ellipse((left, top, left + side // 2, top + side // 2), (red, green, blue))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def pickapic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,400 pairs in the layout of Pick-a-Pic v2, 300 of them ties."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    folder, rng = tmp_path_factory.mktemp("pickapic"), np.random.default_rng(0)
    for number in range(FILES):
        each = range(number * ROWS // FILES, (number + 1) * ROWS // FILES)
        labels = [0.5 if i % 8 == 0 else float(i % 2) for i in each]
        columns = {
            "caption": [f"scene {i}" for i in each],
            "jpg_0": [jpeg(rng) for _ in each],
            "jpg_1": [jpeg(rng) for _ in each],
            "label_0": labels,
            "label_1": [1 - label for label in labels],
        }
        path = folder / f"train-{number:05d}-of-{FILES:05d}.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=ROW_GROUP)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.safetensors"))}


def stop_after(units: int) -> Callable[[Counts], None]:
    def progress(counts: Counts) -> None:
        # in the middle of the unit after that
        if counts.units == units and counts.images % ROW_GROUP:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def whole(pickapic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    counts = encode_dataset(open_dataset("auto", pickapic), POOLING, out)
    assert counts == Counts(units=24, images=ROWS - TIES)
    return out


def test_every_preference_image_is_in_the_shards(whole: Path) -> None:
    shards = LatentShards(whole, "pooling", 64)
    assert (len(shards), shards.shapes) == (2100, {(64, 64): (4, 16, 16)})
    _, captions = shards.read(range(2100))
    assert captions == [f"scene {i}" for i in range(ROWS) if i % 8]


def test_an_interrupted_run_resumes_and_writes_the_same_shards(
    pickapic: Path, whole: Path, tmp_path: Path
) -> None:
    dataset = open_dataset("auto", pickapic)
    for units in (7, 15):
        with pytest.raises(KeyboardInterrupt):
            encode_dataset(dataset, POOLING, tmp_path, progress=stop_after(units))
        assert len(contents(tmp_path)) == units
    left_over = tmp_path / f".{shard_path(tmp_path, 15).name}.1.partial"
    left_over.write_bytes(b"half a shard of a process that was killed")
    assert encode_dataset(dataset, POOLING, tmp_path) == Counts(
        units=24, reused=15, images=sum(i % 8 > 0 for i in range(15 * ROW_GROUP, ROWS))
    )
    assert contents(tmp_path) == contents(whole)
    assert not left_over.exists()
    assert LatentShards(tmp_path).batch(0, 99, seed=1) == LatentShards(whole).batch(0, 99, seed=1)


def test_two_processes_write_the_shards_of_one(pickapic: Path, whole: Path, tmp_path: Path) -> None:
    dataset = open_dataset("auto", pickapic)
    first = encode_dataset(dataset, POOLING, tmp_path, rank=0, world=2, workers=2)
    assert set(contents(tmp_path)) == {shard_path(tmp_path, unit).name for unit in range(0, 24, 2)}
    second = encode_dataset(dataset, POOLING, tmp_path, rank=1, world=2)
    assert first.images + second.images == ROWS - TIES
    assert contents(tmp_path) == contents(whole)


def write_list(folder: Path, count: int, bad: int = 0) -> PreferenceDataset:
    """Returns a JSONL dataset whose last `bad` images are truncated."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    rows: list[str] = []
    for i in range(count):
        data = jpeg(rng)
        (folder / f"{i}.jpg").write_bytes(data[: len(data) // 2] if i >= count - bad else data)
        rows.append(json.dumps({"image": f"{i}.jpg", "caption": f"scene {i}"}))
    (folder / "list.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return open_dataset("jsonl", folder / "list.jsonl")


def test_the_embedded_autoencoder_makes_latents_that_decode_to_the_images(tmp_path: Path) -> None:
    dataset = write_list(tmp_path / "in", 40)
    base = load_tiny()
    assert (
        encode_dataset(dataset, ImageEncoder(64, "tiny", base.encode), tmp_path / "out", batch=16).images
        == 40
    )
    latents, captions = LatentShards(tmp_path / "out", "tiny").read(range(40))
    assert latents.shape == (40, 4, 16, 16)
    assert captions == [f"scene {i}" for i in range(40)]
    originals = [found for found in dataset.read(0) if isinstance(found, ImageFile)]
    ready = [found for each in originals if isinstance(found := prepare(each, 64, 0), PreparedImage)]
    pixels = torch.from_numpy(np.stack([found.pixels_HWC for found in ready])).permute(0, 3, 1, 2) / 255.0
    with torch.no_grad():
        assert F.mse_loss(base.decode(latents.float()), pixels) < 0.1 * pixels.var()


def test_bad_images_up_to_one_in_a_hundred_are_skipped_and_listed(tmp_path: Path) -> None:
    dataset = write_list(tmp_path / "in", 300, bad=3)
    counts = encode_dataset(dataset, POOLING, tmp_path / "out")
    assert counts == Counts(units=1, images=297, bad=3)
    named = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert [(row["unit"], row["name"]) for row in named] == [
        (0, f"list.jsonl:{i + 1}:{i}.jpg") for i in (297, 298, 299)
    ]
    assert all("cannot be decoded" in row["reason"] for row in named)
    assert LatentShards(tmp_path / "out").read([296])[1] == ["scene 296"]


def test_more_bad_images_stop_the_run_and_are_listed(tmp_path: Path) -> None:
    dataset = write_list(tmp_path / "in", 300, bad=4)
    with pytest.raises(
        HyperAlignError, match=r"3 of 299 images are bad; at most 1 % may be. The last is list\.jsonl"
    ):
        encode_dataset(dataset, POOLING, tmp_path / "out", batch=4)
    assert len((tmp_path / "out" / "bad.jsonl").read_text().splitlines()) == 3
    assert not contents(tmp_path / "out")


def test_latents_that_are_not_finite_are_bad_images(tmp_path: Path) -> None:
    def overflow(images_BCHW: Tensor) -> Tensor:
        latents = pool(images_BCHW)
        latents[0] = 1e6  # more than float16 holds
        return latents

    encoder = dataclasses.replace(POOLING, encode=overflow)
    dataset, out = write_list(tmp_path / "in", 20), tmp_path / "out"
    assert encode_dataset(dataset, encoder, out, batch=20).bad == 1
    assert LatentShards(out).read(range(19))[1] == [f"scene {i}" for i in range(1, 20)]
    assert encode_dataset(dataset, encoder, tmp_path / "wide", dtype=torch.bfloat16).bad == 0


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder, rng = tmp_path / "tars", np.random.default_rng(2)
    folder.mkdir()
    for number in range(4):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name, data in (("jpg_1.jpg", jpeg(rng)), ("label_0.txt", b"0"), ("caption.txt", b"a")):
                info = tarfile.TarInfo(f"0.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def test_an_unreadable_unit_is_skipped_until_it_is_whole(tars: Path, tmp_path: Path) -> None:
    whole = (tars / "1.tar").read_bytes()
    (tars / "1.tar").write_bytes(whole[:600])
    out = tmp_path / "out"
    assert encode_dataset(open_dataset("auto", tars), POOLING, out) == Counts(units=3, unreadable=1, images=3)
    assert not shard_path(out, 1).exists()
    assert json.loads((out / "bad.jsonl").read_text())["name"] == "1.tar"
    (tars / "2.tar").write_bytes(whole[:600])
    for unit in (1, 2):
        shard_path(out, unit).unlink(missing_ok=True)
    with pytest.raises(HyperAlignError, match="2 of 4 units cannot be read"):
        encode_dataset(open_dataset("auto", tars), POOLING, out)
    for number in (1, 2):
        (tars / f"{number}.tar").write_bytes(whole)
    assert encode_dataset(open_dataset("auto", tars), POOLING, out) == Counts(units=4, reused=2, images=2)


def test_a_corrupt_shard_is_made_again_alone(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode_dataset(open_dataset("auto", tars), POOLING, out)
    before = contents(out)
    shard_path(out, 2).write_bytes(before[shard_path(out, 2).name][:-1])
    assert encode_dataset(open_dataset("auto", tars), POOLING, out) == Counts(units=4, reused=3, images=1)
    assert contents(out) == before


def test_shards_of_something_else_are_never_mixed_in(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode_dataset(open_dataset("auto", tars), POOLING, out)
    with pytest.raises(HyperAlignError, match=r"was encoded by pooling, not sdxl. Choose another --out"):
        encode_dataset(open_dataset("auto", tars), dataclasses.replace(POOLING, fingerprint="sdxl"), out)
    with pytest.raises(HyperAlignError, match="holds images with a side of 64, not 128"):
        encode_dataset(open_dataset("auto", tars), dataclasses.replace(POOLING, resolution=128), out)
    (tars / "0.tar").unlink()
    with pytest.raises(HyperAlignError, match=r"was made from 0\.tar, not 1\.tar"):
        encode_dataset(open_dataset("auto", tars), POOLING, out)


@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """Files may grow to 20 kB, as on a disk that is full after that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_sentence_and_finished_shards_stay(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, count in enumerate((2, 20, 2)):  # the shard of the second is too large
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for key in range(count):
                for name, data in (("jpg_0", jpeg(rng)), ("label_0", b"1"), ("caption", b"a")):
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    out = tmp_path / "out"
    sentence = r"shard-000001.* cannot be written \(.*too large.*Make room"
    with small_disk(), pytest.raises(HyperAlignError, match=sentence):
        encode_dataset(open_dataset("auto", tmp_path), POOLING, out)
    assert list(contents(out)) == ["shard-000000.safetensors"]
    assert not list(out.glob(".*partial"))


def test_an_out_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HyperAlignError, match="cannot be written"):
        encode_dataset(write_list(tmp_path / "in", 1), POOLING, tmp_path / "file" / "out")


def stripes(width: int, height: int) -> ImageFile:
    """Returns an image that is green in the square of its middle and red beside it."""
    side = min(width, height)
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste(
        (0, 255, 0), ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
    )
    file = io.BytesIO()
    image.save(file, "PNG")
    return ImageFile("a", file.getvalue(), "a")


@pytest.mark.parametrize(("width", "height"), [(90, 30), (30, 90), (32, 32), (200, 128), (16, 16)])
def test_images_are_cropped_in_the_middle(width: int, height: int) -> None:
    found = prepare(stripes(width, height), 32, 0)
    assert isinstance(found, PreparedImage)
    assert found.pixels_HWC.shape == (32, 32, 3)
    assert (found.pixels_HWC[3:-3, 3:-3] == (0, 255, 0)).all()  # resampling mixes the rim


def test_shrinking_does_not_alias() -> None:
    board = np.indices((256, 256)).sum(0) % 2 * 255
    file = io.BytesIO()
    Image.fromarray(board.astype(np.uint8)).save(file, "PNG")
    found = prepare(ImageFile("a", file.getvalue(), "a"), 60, 0)
    assert isinstance(found, PreparedImage)
    assert found.pixels_HWC[8:-8, 8:-8].std() < 6


def test_images_that_would_be_enlarged_may_be_skipped(tmp_path: Path) -> None:
    assert prepare(stripes(90, 30), 32, min_side=31) is None
    dataset = write_list(tmp_path / "in", 3)
    counts = encode_dataset(dataset, POOLING, tmp_path / "out", min_side=65)
    assert counts == Counts(units=1, too_small=3)
    assert not isinstance(prepare(BadImage("a", "b"), 32, 0), PreparedImage)


def test_two_processes_of_the_command_line_encode_every_unit_once(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("train/encode.py", "--recipe", "train/recipes/tiny_s.toml", "--source", str(tars))
    done = in_processes(2, tmp_path, script, *command, "--out", str(out))
    assert [process.status for process in done] == [0, 0], done
    assert done[0].output == f"Encoded 2 images in this process to {out}.\n"
    shards = LatentShards(out, resolution=64)
    assert (len(shards), shards.shapes) == (4, {(64, 64): (4, 16, 16)})


def test_the_command_line_reports_errors_in_one_sentence(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / "train" / "recipes" / "tiny_s.toml"
    arguments = ["--recipe", str(recipe), "--out", str(tmp_path / "out"), "--source"]
    assert main([*arguments, str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: There is no ")
    (tars / "1.tar").write_bytes(b"")
    assert main([*arguments, str(tars)]) == 1
    assert "1 units cannot be read and were skipped" in capsys.readouterr().err


def test_unsafe_images_are_skipped_counted_and_recorded(tmp_path: Path) -> None:
    write_list(tmp_path / "in", 10)
    path, mark = tmp_path / "in" / "list.jsonl", UnsafeFilter("nsfw", 0.2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps(row | {"nsfw": 0.1 * number}) for number, row in enumerate(rows)]
    path.write_text("\n".join(lines))
    out = tmp_path / "out"
    counts = encode_dataset(open_dataset("jsonl", path, mark), POOLING, out, unsafe=mark)
    assert (counts.images, counts.unsafe, counts.bad) == (3, 7, 0)
    assert skipped(counts) == "Skipped: 7 marked unsafe."
    assert LatentShards(out).unsafe_summary() == "7 of 10 images excluded as unsafe (nsfw > 0.2)"
    again = encode_dataset(open_dataset("jsonl", path, mark), POOLING, out, unsafe=mark)
    assert (again.reused, again.images) == (1, 0)
    with pytest.raises(HyperAlignError, match="unsafe nsfw > 0.2, not nothing. Choose another --out"):
        encode_dataset(open_dataset("jsonl", path), POOLING, out)
