"""Reads prompts from text, JSON, JSON lines, parquet and tab-separated files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from hyperalign.errors import HyperAlignError, shortened, shown
from hyperalign.files import first_line
from hyperalign.geneval.prompts import parse_prompt
from hyperalign.rewards.text import check_characters
from train.data.parquet import open_parquet

CAPTION_KEYS = ("prompt", "caption", "text")
"""Columns or keys of the prompt, in order of preference; upper and lower case are equal."""


def load_prompts(path: Path) -> list[str]:
    """Returns the distinct, stripped, non-empty prompts of a file in its order.

    `.txt`: one per line. `.jsonl`: an object or a string per line (GenEval's evaluation_metadata.jsonl).
    `.json`: a list of objects or strings (HPDv2's train.json and benchmark files). `.parquet` (Pick-a-Pic)
    and `.tsv` (PartiPrompts): a column. Objects and columns are named `prompt`, `caption` or `text`.

    Raises:
        HyperAlignError: the file is missing, has an unknown suffix, no such column, a bad line (named by
            its number), or no prompt.
    """
    if not path.is_file():
        raise HyperAlignError(
            f"There is no prompt file {path}. Give a .txt, .jsonl, .json, .parquet or .tsv."
        )
    match path.suffix.lower():
        case ".txt":
            texts: Iterable[str] = (line for _, line in text_lines(path))
        case ".jsonl":
            texts = (caption_of(row, f"{path}, line {number}") for number, row in json_lines(path))
        case ".json":
            texts = (caption_of(row, f"{path}, entry {i}") for i, row in enumerate(json_list(path), 1))
        case ".parquet":
            texts = _parquet_captions(path)
        case ".tsv":
            texts = _table_captions(path)
        case other:
            raise HyperAlignError(
                f"{path} ends in {other!r}; prompts are read from .txt, .jsonl, .json, .parquet and .tsv."
            )
    prompts = list(dict.fromkeys(stripped for text in texts if (stripped := text.strip())))
    for prompt in prompts:
        check_characters(prompt, f" of {path}")
    if not prompts:
        raise HyperAlignError(f"{path} holds no prompt. Put one on each line, or name another file.")
    return prompts


def load_prompt_list(path: Path) -> list[dict[str, Any]]:
    """Returns the metadata of each prompt of a file, at least `prompt`.

    GenEval's lines (with `tag` and `include`) stay as they are, each at its place. Of other files, in any
    form that `load_prompts` takes, every distinct prompt comes once.

    Raises:
        HyperAlignError: as `load_prompts`, or a line of GenEval's that lacks something.
    """
    if path.suffix.lower() == ".jsonl" and path.is_file():
        rows = [row for _, row in json_lines(path)]
        if rows and all(isinstance(row, dict) and {"tag", "include"} <= row.keys() for row in rows):
            for row in rows:
                parse_prompt(row)
            return cast("list[dict[str, Any]]", rows)
    return [{"prompt": prompt} for prompt in load_prompts(path)]


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields numbered lines. Raises HyperAlignError at one that is not UTF-8."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise HyperAlignError(
                    f"{path}, line {number} is not UTF-8 text ({error.reason}). Save the file as UTF-8."
                ) from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the value of every line that is not blank. Raises HyperAlignError at one that is not JSON."""
    for number, line in text_lines(path):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise HyperAlignError(
                    f"{path}, line {number} is not JSON ({_fault(error)}). Correct or remove that line."
                ) from error


def _fault(error: Exception) -> str:
    """Returns what is wrong with a JSON text, without the place, which the message has already."""
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


def json_list(path: Path) -> list[Any]:
    """Returns the list in a JSON file. Raises HyperAlignError if it holds anything else."""
    text = "\n".join(line for _, line in text_lines(path))
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise HyperAlignError(f"{path}{line} is not JSON ({_fault(error)}). Correct it.") from error
    if not isinstance(value, list):
        raise HyperAlignError(
            f"{path} holds a {type(value).__name__}; expected a list of prompts or of objects. "
            "Put the rows into one [ ... ]."
        )
    return cast("list[Any]", value)


def caption_of(row: object, where: str) -> str:
    """Returns the text of a string or of an object with one of CAPTION_KEYS. Raises HyperAlignError."""
    value = caption_value(row, where)
    if not isinstance(value, str):
        raise HyperAlignError(f"{where}: the caption is {shown(value)}; expected a string.")
    return value


def caption_value(row: object, where: str) -> object:
    """Returns a string itself, or what an object has under one of CAPTION_KEYS. Raises HyperAlignError."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise HyperAlignError(f"{where} is a {type(row).__name__}; expected a string or an object.")
    keys = cast("dict[str, Any]", row)
    return keys[caption_column(keys, where)]


def caption_column(columns: Iterable[str], where: str) -> str:
    """Returns the column that holds the prompt. Raises HyperAlignError if none does."""
    found = list(columns)
    for key in CAPTION_KEYS:
        for column in found:
            if column.lower() == key:
                return column
    raise HyperAlignError(
        f"{where} has {shortened(', '.join(found)) or 'nothing'}; expected one of {', '.join(CAPTION_KEYS)}. "
        "Rename the one that holds the prompt."
    )


def _parquet_captions(path: Path) -> Iterator[str]:
    file = open_parquet(path)
    column = caption_column(file.schema_arrow.names, f"{path}")
    for batch in file.iter_batches(columns=[column]):
        yield from (str(value) for value in batch.column(0).to_pylist() if value is not None)


def _table_captions(path: Path) -> Iterator[str]:
    lines = (line for _, line in text_lines(path))
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        header = next(rows, None)
        if header is None:
            return
        column = header.index(caption_column(header, f"{path}"))
        for number, row in enumerate(rows, 2):
            if len(row) <= column:
                raise HyperAlignError(
                    f"{path}, line {number} has {len(row)} of {len(header)} columns. Correct or remove that "
                    "line."
                )
            yield row[column]
    except csv.Error as error:
        raise HyperAlignError(
            f"{path}, line {rows.line_num} is no row of a table ({error}). Correct or remove that line."
        ) from error
