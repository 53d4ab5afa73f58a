"""Tables and lists of prompts in every format that a command takes, with any damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import WORDS, Case, damaged, fuzzed, json_texts
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.cli.common.prompts import find_prompts, read_prompts
from hyperalign.geneval.prompts import read_metadata
from train.data.prompts import load_prompt_list, load_prompts

ROWS = [
    {"name": "a.png", "prompt": "a cat, „quoted“"},
    {"file_name": "b.png", "text": "a dog\nin snow"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2, "color": "red", "position": ["left of", 0]}],
     "prompt": "two cats"},
]  # fmt: skip
CELLS = (
    st.text(max_size=5)
    | WORDS
    | st.sampled_from(['"', ",", "\t", "\r", "\n", "\0", "name", "prompt", "a" * 140_000])
)


@st.composite
def tables(draw: st.DrawFn, separator: str) -> str:
    """A table with a header, whose cells hold anything."""
    head = draw(st.sampled_from(["name,prompt", "file_name,text", "prompt", ""])).replace(",", separator)
    rows = draw(st.lists(st.lists(CELLS, max_size=4), max_size=4))
    return "\n".join([head, *(separator.join(row) for row in rows)])


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's ending and its content."""
    ending = draw(st.sampled_from(["csv", "tsv", "jsonl", "json", "txt", "parquet"]))
    match ending:
        case "csv" | "tsv":
            text = draw(tables("," if ending == "csv" else "\t"))
        case "jsonl":
            text = "\n".join(draw(st.lists(st.sampled_from(ROWS).flatmap(json_texts), max_size=3)))
        case "json":
            text = draw(json_texts(ROWS))
        case _:
            text = draw(st.text())
    content = text.encode("utf-8", draw(st.sampled_from(["surrogatepass", "replace"])))
    return ending, draw(damaged(content)) if draw(st.integers(0, 3)) == 0 else content


def use(name: str, path: Path) -> None:
    """Reads a file as one of the commands does; what it returns can be written as UTF-8."""
    readers: dict[str, Callable[[], Any]] = {
        "table": lambda: read_prompts(path),
        "score": lambda: find_prompts(path.parent, ["a.png", "b.png"], str(path)),
        "beside": lambda: find_prompts(path.parent, ["case.png"], "txt"),
        "train": lambda: load_prompts(path),
        "generate": lambda: load_prompt_list(path),
        "geneval": lambda: read_metadata(path),
    }
    json.dumps(readers[name](), ensure_ascii=False).encode("utf-8")


READERS = {
    "csv": ["table", "score"], "tsv": ["train", "generate"], "txt": ["train", "beside"], "json": ["train"],
    "jsonl": ["table", "score", "train", "generate", "geneval"], "parquet": ["train"],
}  # fmt: skip


@fuzzed()
@given(st.data(), files())
def test_any_table_of_prompts_is_read_or_refused(
    case: Case, data: st.DataObject, drawn: tuple[str, bytes]
) -> None:
    ending, content = drawn
    reader = data.draw(st.sampled_from(READERS[ending]))
    case.check(f"case.{ending}", content, lambda path: use(reader, path))
    (case.folder / f"case.{ending}").unlink()
