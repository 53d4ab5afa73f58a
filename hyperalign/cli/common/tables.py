"""Tables about images that users give: .csv with a header, or .jsonl with an object per line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ...errors import HyperAlignError

NAME_KEYS = ("name", "file_name", "filename", "file", "image", "path")
PROMPT_KEYS = ("prompt", "text", "caption")
SURPLUS = "more"
"""The column of cells beyond the header's."""


def read_rows(path: Path, option: str, alternative: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields the rows of a table with their line numbers; a line that is not an object is an empty row.

    Args:
        path: of the table.
        option: of the command line that named it, for messages.
        alternative: what else the option accepts, for messages.

    Raises:
        HyperAlignError: the file is missing, of another kind or damaged.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise HyperAlignError(f"{option} is {str(path)!r}; expected a .csv or .jsonl file, or {alternative}.")
    if not path.is_file():
        raise HyperAlignError(f"{option}: there is no file {path}; give an existing .csv or .jsonl file.")
    text = read_text(path)
    return _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)


def read_text(path: Path) -> str:
    """Returns the text of a file in UTF-8. Raises HyperAlignError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise HyperAlignError(f"{path} cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from error


def value_of(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Returns the text in the first of some columns that a row has, in upper or lower case."""
    lowered = {key.strip().lower(): value for key, value in row.items()}
    return next((value for key in keys if isinstance(value := lowered.get(key), str)), None)


def image_name(name: str) -> str:
    """Returns an image's name in a table as `list_images` spells it: with forward slashes, without `./`."""
    return name.replace("\\", "/").removeprefix("./")


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=SURPLUS)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise HyperAlignError(
            f"{path.name}, line {reader.line_num} is not CSV ({error}). Save the table again."
        ) from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise HyperAlignError(f"{path.name}, line {number} is not JSON ({error}). Correct it.") from error
        yield number, cast("dict[str, Any]", row) if isinstance(row, dict) else {}
