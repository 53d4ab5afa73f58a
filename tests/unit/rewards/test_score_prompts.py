"""Prompts of images: tables and text files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.cli.common.prompts import find_prompts, read_prompts
from hyperalign.errors import HyperAlignError

NAMES = ["a.png", "b/a.png", "b/c.png"]


@given(st.dictionaries(st.sampled_from(NAMES), st.text(min_size=1), min_size=1))
def test_both_kinds_of_table_preserve_any_text(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    with (folder / "t.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("Name", "Prompt"), *table.items()])
    rows = [json.dumps({"file_name": name, "caption": text}) for name, text in table.items()]
    (folder / "t.jsonl").write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    assert read_prompts(folder / "t.csv") == read_prompts(folder / "t.jsonl") == table


def test_a_table_may_omit_folders_if_names_are_unique(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("name,prompt\na.png,first\n./b\\a.png,second\nc.png,third\n")
    assert find_prompts(tmp_path, NAMES, str(path)) == ["first", "second", "third"]
    path.write_text("name,prompt\na.png,first\nc.png,third\n")
    with pytest.raises(HyperAlignError, match=r"only the last part of b/a\.png, d/a\.png"):
        find_prompts(tmp_path, ["b/a.png", "d/a.png"], str(path))
    with pytest.raises(HyperAlignError, match=r"without one: b/a\.png"):
        find_prompts(tmp_path, NAMES, str(path))


def test_text_files_beside_the_images(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in zip(("a.txt", "b/a.txt", "b/c.txt"), ("one\n", "\ufefftwo", "three"), strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert find_prompts(tmp_path, NAMES, "txt") == ["one", "two", "three"]
    (tmp_path / "b/c.txt").write_text(" \n")
    with pytest.raises(HyperAlignError, match=r"Found 3 images and prompts for 2 .* without one: b/c\.png"):
        find_prompts(tmp_path, NAMES, "txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HyperAlignError, match="UTF-8"):
        find_prompts(tmp_path, NAMES, "txt")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.xlsx", "", "expected a .csv or .jsonl file"),
        ("t.jsonl", '{"name": "a.png"', "line 1 is not JSON"),
        ("t.jsonl", "[" * 100_000, "line 1 is not JSON .maximum recursion"),
        ("t.jsonl", '"a.png"', "found the fields none; expected a name"),
        ("t.csv", "image,words\na,b\n", "line 2: found the fields image, words; expected a name"),
        ("t.csv", "name,prompt\na.png,x\na.png,y\n", "line 3: a.png has another prompt above"),
        ("t.csv", "name,prompt\na.png,x\n", "prompts for 1 of them"),
    ],
)
def test_unreadable_tables_are_refused_in_one_sentence(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(HyperAlignError, match=said):
        find_prompts(tmp_path, NAMES, str(tmp_path / name))


def test_a_table_that_is_not_there_is_named() -> None:
    with pytest.raises(HyperAlignError, match=r"--prompts: there is no file nowhere\.csv"):
        find_prompts(Path(), NAMES, "nowhere.csv")


@pytest.mark.parametrize("half", ["\\ud83d", "\\udc31"])
def test_half_an_emoji_is_refused_and_its_image_named(tmp_path: Path, half: str) -> None:
    """Cutting UTF-16 text can leave one; JSON accepts it, tokenizers do not."""
    lines = [{"name": "a.png", "prompt": "a \U0001f431"}, {"name": "b.png", "prompt": "a CUT cat"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines).replace("CUT", half))
    assert find_prompts(tmp_path, ["a.png"], str(path)) == ["a \U0001f431"]
    with pytest.raises(HyperAlignError, match=r"half a character \('\\u.*' of b\.png; expected whole ones"):
        find_prompts(tmp_path, ["a.png", "b.png"], str(path))
