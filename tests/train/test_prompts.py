"""Prompts are read from all supported files, and errors name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hyperalign.errors import HyperAlignError
from train.data.prompts import load_prompts

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GENEVAL = DATA / "geneval" / "evaluation_metadata.jsonl"
PARTI = DATA / "parti" / "PartiPrompts.tsv"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pq.write_table(pa.table(columns), path)
    return path


def test_a_text_file_gives_distinct_stripped_lines_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "\ufeff a cat \r\n\n#1 dog\na cat\n  \nein Bär\n")
    assert load_prompts(path) == ["a cat", "#1 dog", "ein Bär"]


def test_json_lines_may_be_objects_or_strings_and_prompt_wins_over_caption(tmp_path: Path) -> None:
    rows = [{"caption": "b", "prompt": "a"}, {"caption": "c"}, {"Text": "d"}, "e"]
    path = write(tmp_path / "p.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    assert load_prompts(path) == ["a", "c", "d", "e"]


def test_hpd_files_give_their_prompts(tmp_path: Path) -> None:
    pairs = [{"prompt": "a fox", "file_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0]}] * 3
    ranked = [{"prompt": "a hen", "image_path": ["0.jpg"], "rank": [1], "raw_annotations": []}]
    assert load_prompts(write(tmp_path / "train.json", json.dumps(pairs))) == ["a fox"]
    assert load_prompts(write(tmp_path / "test.json", json.dumps(ranked))) == ["a hen"]
    assert load_prompts(write(tmp_path / "anime.json", json.dumps(["x", "y", "x"], indent=1))) == ["x", "y"]


def test_parquet_gives_its_caption_column(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", {"user_id": [1, 2, 3], "caption": ["a", None, "b"]})
    assert load_prompts(path) == ["a", "b"]


@pytest.mark.skipif(not GENEVAL.exists(), reason="GenEval's prompts are not in ../shared/data")
def test_all_geneval_prompts_are_read() -> None:
    prompts = load_prompts(GENEVAL)
    assert prompts[0] == "a photo of a bench"
    assert len(prompts) == len(set(prompts)) > 500


@pytest.mark.skipif(not PARTI.exists(), reason="PartiPrompts are not in ../shared/data")
def test_all_parti_prompts_are_read_quotes_and_all() -> None:
    prompts = load_prompts(PARTI)
    assert len(prompts) == 1632
    assert prompts[0] == "bond"
    assert 'the saying "BE EXCELLENT TO EACH OTHER"' in "\n".join(prompts)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", " \n\n", "holds no prompt"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.json", "", "holds no prompt"),
        ("p.json", "[]", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n{"tag": "a"}',
            "line 3 has tag; expected one of prompt, caption, text",
        ),
        ("p.jsonl", '{"prompt": ["a"]}', r"line 1: the caption is \['a'\]"),
        ("p.jsonl", "3", "line 1 is a int"),
        ("p.json", '[\n"a",\nb]', "line 3 is not JSON"),
        ("p.json", '{"prompt": "a"}', "holds a dict; expected a list"),
        ("p.json", '["a", {"x": 1}]', "entry 2 has x"),
        ("p.tsv", "Prompt\tNote\na\tb\n\n", "line 3 has 0 of 2 columns"),
        ("p.tsv", "Question\tNote\na\tb\n", "has Question, Note; expected one of"),
        ("p.csv", "Prompt\n", "ends in '.csv'"),
        ("p.jsonl", "[" * 100_000, "line 1 is not JSON .maximum recursion"),
        ("p.json", "[" * 100_000, "is not JSON .maximum recursion"),
        ("p.jsonl", "9" * 5000, "line 1 is not JSON .*digits"),
        ("p.tsv", "prompt\n" + "a" * 140_000, "line 2 is no row of a table .field larger"),
        ("p.json", r'["\ud83d"]', "half a character"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(HyperAlignError, match=said):
        load_prompts(write(tmp_path / name, text))


def test_missing_broken_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HyperAlignError, match="There is no prompt file"):
        load_prompts(tmp_path / "none.txt")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("one\nB\u00e4r\n".encode("latin-1"))
    with pytest.raises(HyperAlignError, match="line 2 is not UTF-8"):
        load_prompts(latin)
    with pytest.raises(HyperAlignError, match="has user_id; expected one of"):
        load_prompts(parquet(tmp_path / "p.parquet", {"user_id": [1]}))
    with pytest.raises(HyperAlignError, match="not a whole parquet file"):
        load_prompts(write(tmp_path / "q.parquet", "PAR1"))
