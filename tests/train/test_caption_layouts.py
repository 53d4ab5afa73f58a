"""Captions beside images, imagefolders, lists of captions, HPDv3, and parquet files with a chosen image."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hyperalign.errors import HyperAlignError
from train.data.preference import detect_kind, open_dataset
from train.data.preference.dataset import BadImage, DatasetItem, ImageFile, UnsafeFilter, UnsafeImage


def png(shade: int = 200) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), shade).save(file, "PNG")
    return file.getvalue()


def items(path: Path, unsafe: UnsafeFilter | None = None) -> list[DatasetItem]:
    dataset = open_dataset("auto", path, unsafe)
    return [item for unit in range(dataset.units()) for item in dataset.read(unit)]


def captions(path: Path) -> list[str]:
    found = items(path)
    assert all(isinstance(item, ImageFile) for item in found), found
    return [item.caption for item in found if isinstance(item, ImageFile)]


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")


# Beside the image


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a fox"), ("a.caption", "a fox"), ("a.json", {"Text": "a fox", "score": 3}),
        ("a.json", {"caption": ["a fox"]}), ("a.json", "\"a fox\""), ("a.json", ["a fox"]),
    ],
)  # fmt: skip
def test_a_caption_is_in_the_file_beside_its_image(tmp_path: Path, name: str, content: object) -> None:
    (tmp_path / "a.png").write_bytes(png())
    write(tmp_path / name, content)
    assert captions(tmp_path) == ["a fox"]


def test_the_first_of_several_files_beside_an_image_counts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    write(tmp_path / "a.json", {"text": "of json"})
    write(tmp_path / "a.caption", "of caption")
    assert captions(tmp_path) == ["of caption"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.xml", "<a/>", "expected a.txt, a.caption, a.json beside it, found a.xml"),
        ("a.json", "{", "its caption a.json cannot be read"),
        ("a.json", {"tags": "x"}, "a.json has tags; expected one of prompt, caption, text"),
        ("a.json", {"text": 3}, "a.json: the caption is 3; expected a string or a list of strings"),
        ("a.json", {"text": []}, "a.json: the caption is []"),
    ],
)
def test_an_image_without_a_usable_caption_says_what_was_found(
    tmp_path: Path, name: str, content: object, said: str
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    write(tmp_path / name, content)
    (bad,) = items(tmp_path)
    assert isinstance(bad, BadImage)
    assert said in bad.reason


# Lists


@pytest.mark.parametrize("split", ["", "train"])
def test_an_imagefolder_is_read_by_its_metadata(tmp_path: Path, split: str) -> None:
    folder = tmp_path / split
    write(folder / "metadata.jsonl", '{"file_name": "img/a.png", "text": "a fox"}\n')
    (folder / "img").mkdir()
    (folder / "img" / "a.png").write_bytes(png())
    assert detect_kind(tmp_path) == "imagefolder"
    assert captions(tmp_path) == captions(folder / "metadata.jsonl") == ["a fox"]


def test_a_folder_without_metadata_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x")
    with pytest.raises(HyperAlignError, match=r"holds a.txt; expected metadata.jsonl in it or in"):
        open_dataset("imagefolder", tmp_path)
    with pytest.raises(HyperAlignError, match=r"has \.txt and is none of"):
        open_dataset("auto", tmp_path)


def test_of_a_list_of_captions_the_images_name_decides_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"image": "a.png", "caption": ["long", "short", "tags"]}]
    rows += [{"image": f"{i}.png", "caption": ["long", "short", "tags"]} for i in range(300)]
    for i in range(300):
        (tmp_path / f"{i}.png").write_bytes(png())
    write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, rows)))
    found = captions(tmp_path / "b.jsonl")
    assert found == captions(tmp_path / "b.jsonl")
    assert min(Counter(found)[kind] for kind in ("long", "short", "tags")) > 70
    write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows[::-1])))
    assert captions(tmp_path / "c.jsonl") == found[::-1]  # wherever it stands


# HPDv3


def test_hpd3_prefers_the_first_path_and_drops_ties(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "path1": "images/1.png", "path2": "images/2.png", "choice_dist": [12, 7],
         "confidence": 0.99, "model1": "flux", "model2": "infinity"},
        {"prompt": "a", "path1": "images/1.png", "path2": "images/3.png", "choice_dist": None},
        {"prompt": "b", "path1": "images/2.png", "path2": "images/3.png", "choice_dist": [5, 5]},
        {"prompt": "c", "path1": "images/3.png", "path2": "images/1.png"},
    ]  # fmt: skip
    (tmp_path / "images").mkdir()
    for number in (1, 2, 3):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
    for name in ("all.json", "train.json"):
        write(tmp_path / name, rows)
        found = items(tmp_path)
        assert [(item.caption, item.name) for item in found if isinstance(item, ImageFile)] == [
            ("a", "images/1.png"), ("c", "images/3.png"),
        ]  # fmt: skip
        assert len(found) == 2


def test_hpd3_without_images_or_paths_is_named(tmp_path: Path) -> None:
    write(tmp_path / "all.json", [{"prompt": "a", "path1": "images/1.png", "path2": "images/2.png"}])
    with pytest.raises(HyperAlignError, match=r"that all.json names, such as images/1.png"):
        open_dataset("auto", tmp_path)
    write(tmp_path / "all.json", [{"prompt": "a", "path1": "images/1.png"}])
    with pytest.raises(HyperAlignError, match=r"entry 1: path1 is 'images/1.png' and path2 None"):
        open_dataset("auto", tmp_path)


# Parquet


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bytes", "Image of datasets"])
def test_the_chosen_image_of_a_parquet_row_is_read(tmp_path: Path, wrapped: bool) -> None:
    def cell(data: bytes) -> object:
        return {"bytes": data, "path": None} if wrapped else data

    rows = [
        {"prompt": str(i), "chosen": cell(png(i)), "rejected": cell(png(99)), "unsafe": i == 1}
        for i in range(3)
    ]
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    assert detect_kind(tmp_path) == "parquet"
    found = items(tmp_path)
    assert [(item.caption, item.data) for item in found if isinstance(item, ImageFile)] == [
        (str(i), png(i)) for i in range(3)
    ]
    name = "data/train-00000-of-00001.parquet:0:1"
    assert items(tmp_path, UnsafeFilter("unsafe"))[1] == UnsafeImage(name)


def test_single_images_with_lists_of_captions_are_read_and_null_ones_are_bad(tmp_path: Path) -> None:
    rows = [{"image": png(1), "text": ["a"]}, {"image": None, "text": ["b"]}, {"image": png(2), "text": None}]
    write_parquet(tmp_path / "a.parquet", rows)
    first, second, third = items(tmp_path)
    assert isinstance(first, ImageFile)
    assert first.caption == "a"
    assert second == BadImage("a.parquet:0:1", "its image is null")
    assert third == BadImage("a.parquet:1:0", "its caption is null")


def test_parquet_of_another_layout_is_named_by_its_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"prompt": "a", "winner": png()}])
    with pytest.raises(HyperAlignError, match="the columns prompt, winner; expected the preferred image"):
        open_dataset("auto", tmp_path)
    write_parquet(tmp_path / "a.parquet", [{"chosen": png(), "label": 1}])
    with pytest.raises(HyperAlignError, match="has chosen, label; expected one of prompt, caption, text"):
        open_dataset("auto", tmp_path)
    write_parquet(tmp_path / "a.parquet", [{"chosen": "path.png", "prompt": "a"}])
    assert items(tmp_path)[0] == BadImage(
        "a.parquet:0:0", "its chosen is a str; expected the bytes of an image file, or an Image"
    )
