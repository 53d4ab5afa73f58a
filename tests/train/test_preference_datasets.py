"""Every dataset gives the preference images of its real layout, and names what it cannot read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hyperalign.errors import HyperAlignError
from train.data.preference import detect_kind, open_dataset
from train.data.preference.dataset import (
    BadImage,
    ImageFile,
    PreferenceDataset,
    UnreadableUnit,
    UnsafeFilter,
    UnsafeImage,
)
from train.data.preference.decoding import DecodedImage, decode

RED, GREEN, BLUE = (220, 30, 30), (30, 220, 30), (30, 30, 220)


def encoded(colour: tuple[int, ...], kind: str = "JPEG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (16, 12), colour).save(file, kind)
    return file.getvalue()


def everything(dataset: PreferenceDataset) -> list[DecodedImage | BadImage]:
    items = [item for unit in range(dataset.units()) for item in dataset.read(unit)]
    return [
        decode(item) if isinstance(item, ImageFile) else item
        for item in items
        if not isinstance(item, UnsafeImage)
    ]


def seen(dataset: PreferenceDataset) -> list[tuple[str, str]]:
    """Returns caption and main colour of each image; bad ones fail the test."""
    rows: list[tuple[str, str]] = []
    for found in everything(dataset):
        assert isinstance(found, DecodedImage), found
        assert found.image.mode == "RGB"
        pixel = found.image.getpixel((8, 6))
        assert isinstance(pixel, tuple)
        rows.append((found.caption, "rgb"[pixel.index(max(pixel))]))
    return rows


# Pick-a-Pic: first preferred, second preferred, tie, not labelled
PAIRS: list[tuple[str, float | None]] = [("first", 1.0), ("second", 0.0), ("tie", 0.5), ("unlabelled", None)]


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group: int = 3) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)


def pickapic_rows() -> list[dict[str, Any]]:
    return [
        {
            "are_different": True,
            "caption": caption,
            "jpg_0": encoded(RED),
            "jpg_1": encoded(BLUE),
            "label_0": label,
            "label_1": None if label is None else 1 - label,
            "ranking_id": number,
            "nsfw": 0.9 if caption == "second" else 0.1,
        }
        for number, (caption, label) in enumerate(PAIRS)
    ]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pickapic_members() -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for number, (caption, label) in enumerate(PAIRS[:3]):
        members |= {
            f"{number}.jpg_0.jpg": encoded(RED),
            f"{number}.jpg_1.jpg": encoded(BLUE),
            f"{number}.label_0.txt": str(label).encode(),
            f"{number}.original_prompt.txt": caption.encode(),
        }
    return members


def test_pickapic_parquet_drops_ties_and_yields_the_preferred_image(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", pickapic_rows())
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", pickapic_rows())
    dataset = open_dataset("auto", tmp_path)
    assert dataset.units() == 4
    assert dataset.unit_name(3) == "data/train-00001-of-00002.parquet:1"
    assert seen(dataset) == [("first", "r"), ("second", "b")] * 2
    assert [type(found) for found in dataset.read(1)] == []


def test_pickapic_skips_the_validation_and_test_splits(tmp_path: Path) -> None:
    for name in ("train-0.parquet", "test_unique-0.parquet", "validation-0.parquet"):
        write_parquet(tmp_path / name, pickapic_rows())
    assert len(seen(open_dataset("pickapic", tmp_path))) == 2


def test_marked_pairs_are_dropped(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pickapic_rows())
    assert seen(open_dataset("pickapic", tmp_path, UnsafeFilter("nsfw"))) == [("first", "r")]
    with pytest.raises(HyperAlignError, match="no column unsafe; its columns are are_different, caption"):
        open_dataset("pickapic", tmp_path, UnsafeFilter("unsafe"))


def test_parquet_without_images_is_refused(tmp_path: Path) -> None:
    rows = [{"caption": "a", "label_0": 1.0}]
    write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(HyperAlignError, match="no column jpg_0, jpg_1"):
        open_dataset("pickapic", tmp_path)


def test_a_null_image_is_bad(tmp_path: Path) -> None:
    rows = pickapic_rows()
    rows[0]["jpg_0"] = None
    write_parquet(tmp_path / "a.parquet", rows)
    bad, good = everything(open_dataset("auto", tmp_path / "a.parquet"))
    assert bad == BadImage("a.parquet:0:0", "its jpg_0 is null")
    assert isinstance(good, DecodedImage)


def test_pickapic_tars_drop_ties_and_yield_the_preferred_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "00001.tar", pickapic_members())
    write_tar(tmp_path / "00000.tar", pickapic_members())
    dataset = open_dataset("auto", tmp_path)
    assert (dataset.units(), dataset.unit_name(1)) == (2, "00001.tar")
    assert seen(dataset) == [("first", "r"), ("second", "b")] * 2


def test_tars_with_other_endings_folders_and_caption_names_are_read(tmp_path: Path) -> None:
    members = {
        "pairs/ab.jpg_0": encoded(RED),
        "pairs/ab.jpg_1": encoded(BLUE),
        "pairs/ab.label_0": b"0\n",
        "pairs/ab.caption": b"a duck",
        "pairs/ab.nsfw.txt": b"0.2",
        "pairs/cd.jpg_0": encoded(RED),
        "pairs/cd.label_0": b"1",
        "pairs/cd.caption": b"a nude",
        "pairs/cd.nsfw.txt": b"True",
    }
    write_tar(tmp_path / "a.tar", members)
    assert seen(open_dataset("pickapic_tars", tmp_path)) == [("a duck", "b"), ("a nude", "r")]
    assert seen(open_dataset("pickapic_tars", tmp_path, UnsafeFilter("nsfw"))) == [("a duck", "b")]


def test_incomplete_pairs_of_a_tar_are_named(tmp_path: Path) -> None:
    members = pickapic_members()
    del members["0.label_0.txt"], members["1.jpg_1.jpg"]
    write_tar(tmp_path / "a.tar", members)
    assert everything(open_dataset("auto", tmp_path / "a.tar")) == [
        BadImage("a.tar:0", "its label_0 is 'missing', not 0, 0.5 or 1"),
        BadImage("a.tar:1", "it has no jpg_1"),
    ]


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.8])
def test_a_cut_tar_is_an_unreadable_unit(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, pickapic_members())
    path.write_bytes(path.read_bytes()[: int(6000 * keep)])
    dataset = open_dataset("auto", tmp_path)
    with pytest.raises(UnreadableUnit, match=r"a\.tar cannot be read"):
        everything(dataset)


def test_a_parquet_row_group_of_rubbish_is_an_unreadable_unit(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, pickapic_rows(), row_group=2)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    dataset = open_dataset("auto", path)
    with pytest.raises(UnreadableUnit, match="row group 0 cannot be read"):
        list(dataset.read(0))
    assert list(dataset.read(1)) == []


HPD = [
    {"prompt": "a", "file_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0], "user_hash": "x"},
    {"prompt": "a", "file_path": ["0.jpg", "2.jpg"], "human_preference": [1, 0], "user_hash": "y"},
    {"prompt": "b", "image_path": ["1.jpg", "2.jpg"], "human_preference": [0, 1]},
    {"prompt": "c", "file_path": ["1.jpg", "2.jpg"], "human_preference": [0, 0]},
]
HPD_IMAGES = {"0.jpg": encoded(RED), "1.jpg": encoded(GREEN), "2.jpg": encoded(BLUE)}


def write_hpd(root: Path, rows: list[Any]) -> None:
    (root / "train.json").write_text(json.dumps(rows), encoding="utf-8")


@pytest.mark.parametrize("folder", ["train/", "HPD/train/", ""])
def test_hpd_reads_each_winner_once_from_the_tar(tmp_path: Path, folder: str) -> None:
    write_hpd(tmp_path, HPD)
    write_tar(tmp_path / "train.tar", {folder + name: data for name, data in HPD_IMAGES.items()})
    for _ in range(2):  # the second time by the saved index
        dataset = open_dataset("auto", tmp_path)
        assert (dataset.units(), dataset.unit_name(0)) == (1, "train.json[0:2]")
        assert seen(dataset) == [("a", "r"), ("b", "b")]
    assert (tmp_path / "train.tar.index.json").is_file()


def test_hpd_builds_its_index_again_when_tar_or_index_change(tmp_path: Path) -> None:
    write_hpd(tmp_path, HPD)
    write_tar(tmp_path / "train.tar", {f"train/{name}": data for name, data in HPD_IMAGES.items()})
    open_dataset("hpd", tmp_path)
    write_tar(tmp_path / "train.tar", {"pad": b"0" * 999, "0.jpg": encoded(BLUE), "2.jpg": encoded(BLUE)})
    assert seen(open_dataset("hpd", tmp_path)) == [("a", "b"), ("b", "b")]
    (tmp_path / "train.tar.index.json").write_text("[", encoding="utf-8")
    assert seen(open_dataset("hpd", tmp_path)) == [("a", "b"), ("b", "b")]


@pytest.mark.parametrize("folder", ["train", "."])
def test_hpd_reads_an_unpacked_folder(tmp_path: Path, folder: str) -> None:
    write_hpd(tmp_path, HPD)
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, data in HPD_IMAGES.items():
        (tmp_path / folder / name).write_bytes(data)
    assert seen(open_dataset("auto", tmp_path / "train.json")) == [("a", "r"), ("b", "b")]


def test_hpd_names_images_that_the_tar_lacks_or_cuts(tmp_path: Path) -> None:
    write_hpd(tmp_path, HPD)
    write_tar(tmp_path / "train.tar", {"train/0.jpg": HPD_IMAGES["0.jpg"]})
    good, bad = everything(open_dataset("hpd", tmp_path))
    assert isinstance(good, DecodedImage)
    assert bad == BadImage("2.jpg", "it cannot be read from train.tar: no files in it are called 2.jpg")


def test_hpd_names_what_is_missing_and_how_to_unpack(tmp_path: Path) -> None:
    with pytest.raises(HyperAlignError, match=r"There is no .*train\.json"):
        open_dataset("hpd", tmp_path)
    write_hpd(tmp_path, HPD)
    with pytest.raises(HyperAlignError, match=r"neither train\.tar nor the images"):
        open_dataset("hpd", tmp_path)
    with tarfile.open(tmp_path / "train.tar.gz", "w:gz"):
        pass
    with pytest.raises(HyperAlignError, match=r"compressed.*`gunzip .*train\.tar\.gz`"):
        open_dataset("hpd", tmp_path)
    (tmp_path / "train.tar.gz").rename(tmp_path / "train.tar")
    with pytest.raises(HyperAlignError, match=r"not a whole uncompressed tar.*gunzip"):
        open_dataset("hpd", tmp_path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no pair"),
        (HPD[3:], "no pair with one preference image"),
        ([HPD[0], {"prompt": "a", "rank": [1]}], "entry 2 has no 'human_preference'"),
        ([{"prompt": "a", "file_path": ["0.jpg"], "human_preference": [1, 0]}], "entry 1: file_path"),
    ],
)
def test_a_bad_hpd_listing_is_named_by_its_entry(tmp_path: Path, rows: list[Any], said: str) -> None:
    write_hpd(tmp_path, rows)
    with pytest.raises(HyperAlignError, match=said):
        open_dataset("hpd", tmp_path)


def test_a_folder_pairs_images_with_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.png").write_bytes(encoded(BLUE, "PNG"))
    (tmp_path / "b.txt").write_text("blue\n", encoding="utf-8")
    (tmp_path / "sub" / "a.JPG").write_bytes(encoded(RED))
    (tmp_path / "sub" / "a.txt").write_text("red", encoding="utf-8")
    dataset = open_dataset("auto", tmp_path)
    assert seen(dataset) == [("blue", "b"), ("red", "r")]
    (tmp_path / "b.txt").unlink()
    bad = everything(dataset)[0]
    assert isinstance(bad, BadImage)
    assert bad.name == "b.png"
    assert bad.reason == (
        "it has no caption: expected b.txt, b.caption, b.json beside it, found no file of its name"
    )
    with pytest.raises(HyperAlignError, match="has no column 'nsfw'"):
        open_dataset("folder", tmp_path, UnsafeFilter("nsfw"))


def test_json_lines_name_images_relative_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.webp").write_bytes(encoded(GREEN, "WEBP"))
    rows = [
        {"image": "img/a.webp", "caption": "green", "nsfw": False},
        {"image": "img/a.webp", "text": "unsafe", "nsfw": True},
        {"image": "img/none.webp", "prompt": "gone", "nsfw": False},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    good, bad = everything(open_dataset("auto", path, UnsafeFilter("nsfw")))
    assert isinstance(good, DecodedImage)
    assert good.caption == "green"
    assert isinstance(bad, BadImage)
    assert bad.name == "list.jsonl:3:img/none.webp"
    assert "No such file" in bad.reason


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ('{"caption": "a"}', "line 1 has no 'image', only caption"),
        ('{"image": 3, "caption": "a"}', "line 1: 'image' is 3; expected a str"),
        ('{"image": "a.jpg"}', "line 1 has image; expected one of prompt"),
        ("[1]", "line 1 is a list"),
    ],
)
def test_bad_json_lines_are_named_by_their_number(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(HyperAlignError, match=said):
        open_dataset("jsonl", tmp_path / "a.jsonl")


def test_a_listing_is_cut_into_thousands(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(RED))
    lines = (json.dumps({"image": "a.jpg", "caption": str(i)}) for i in range(2001))
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    dataset = open_dataset("jsonl", tmp_path / "a.jsonl")
    assert dataset.units() == 3
    assert [dataset.unit_name(unit) for unit in (0, 2)] == ["a.jsonl[0:1000]", "a.jsonl[2000:2001]"]
    assert [found.caption for found in dataset.read(2) if isinstance(found, ImageFile)] == ["2000"]


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HyperAlignError, match="is none of"):
        detect_kind(tmp_path)
    with pytest.raises(HyperAlignError, match="There is no"):
        open_dataset("auto", tmp_path / "none")
    for kind, ending in (("pickapic", "parquet"), ("pickapic_tars", "tar")):
        with pytest.raises(HyperAlignError, match=f"holds no .{ending} file"):
            open_dataset(kind, tmp_path)
    with pytest.raises(HyperAlignError, match="holds no image"):
        open_dataset("folder", tmp_path)


def test_marks_of_single_images_count_for_the_preferred_one(tmp_path: Path) -> None:
    rows = [row | {"nsfw_0": 0.9, "nsfw_1": 0.0} for row in pickapic_rows()]
    for row in rows:
        del row["nsfw"]
    write_parquet(tmp_path / "a.parquet", rows)
    assert seen(open_dataset("pickapic", tmp_path, UnsafeFilter("nsfw"))) == [("second", "b")]


def test_unsafe_images_are_named_and_not_read(tmp_path: Path) -> None:
    write_hpd(tmp_path, [row | {"nsfw": "a" in row["prompt"]} for row in HPD])
    write_tar(tmp_path / "train.tar", HPD_IMAGES)
    dataset = open_dataset("hpd", tmp_path, UnsafeFilter("nsfw"))
    assert next(iter(dataset.read(0))) == UnsafeImage("0.jpg")
    assert seen(dataset) == [("b", "b")]


def test_the_winner_of_an_unsafe_pair_is_unsafe_in_every_pair(tmp_path: Path) -> None:
    write_hpd(tmp_path, [row | {"nsfw": number == 1} for number, row in enumerate(HPD)])
    write_tar(tmp_path / "train.tar", HPD_IMAGES)
    assert seen(open_dataset("hpd", tmp_path, UnsafeFilter("nsfw"))) == [("b", "b")]


@pytest.mark.parametrize("kind", ["hpd", "jsonl", "pickapic_tars"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, kind: Any) -> None:
    write_hpd(tmp_path, HPD)
    write_tar(tmp_path / "train.tar", pickapic_members())
    (tmp_path / "list.jsonl").write_text('{"image": "a.png", "caption": "a"}', encoding="utf-8")
    path = {"hpd": tmp_path, "jsonl": tmp_path / "list.jsonl", "pickapic_tars": tmp_path / "train.tar"}[kind]
    with pytest.raises(HyperAlignError, match=r"has no '?unrated'?, only (prompt|image|.*jpg_0)"):
        everything(open_dataset(kind, path, UnsafeFilter("unrated")))
