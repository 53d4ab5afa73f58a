"""The log of a scoring run, from which an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Protocol, TextIO, TypeVar, cast

from ...errors import HyperAlignError
from ...files import cannot_write, file_state, first_line, write_text

LOG_VERSION = 1
SCORES_ARE_KEPT = (
    "Free some space or choose another path; the scores so far are kept, and the same command resumes from "
    "them."
)
"""How to fix a table, page or log that cannot be written."""


class ImageRow(Protocol):
    """A dataclass of the results for an image."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """The image's path relative to the folder."""
        ...

    @property
    def size(self) -> int:
        """The image's size in bytes when it was scored."""
        ...

    @property
    def modified(self) -> int:
        """The image's modification time in ns when it was scored."""
        ...


Row = TypeVar("Row", bound=ImageRow)


class Log(AbstractContextManager["Log[Row]"], Generic[Row]):
    """A JSON Lines file of rows about images, to which each batch is appended as it is finished.

    Args:
        path: of the log.
        settings: what all rows of a log have in common.
        row: the dataclass of a row.

    Raises:
        HyperAlignError: the log has other settings, or cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], row: Callable[..., Row]) -> None:
        header = {"version": LOG_VERSION, **settings}
        found = [_row(line, row) for line in _read(path, header)] if path.exists() else []
        self.rows = {row.name: row for row in found if row is not None}
        lines = [header, *(asdict(row) for row in self.rows.values())]
        self._path = path
        with cannot_write(path, SCORES_ARE_KEPT):
            # Rewriting removes a line that an interruption cut off before new lines follow it.
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            self._stream: TextIO = path.open("a", encoding="utf-8")

    def append(self, rows: Sequence[Row]) -> None:
        """Appends rows; after that they survive the end of the process. Raises HyperAlignError."""
        with cannot_write(self._path, SCORES_ARE_KEPT):
            self._stream.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))
            self._stream.flush()
        self.rows |= {row.name: row for row in rows}

    def current(self, folder: Path, name: str) -> Row | None:
        """Returns an image's row, or None if there is none or the file has changed since."""
        row = self.rows.get(name)
        return row if row is not None and (row.size, row.modified) == file_state(folder / name) else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def log_path(path: Path) -> Path:
    """Returns the path of the log of a table or of results."""
    return path.with_name(f".{path.name}.log.jsonl")


def _read(path: Path, expected: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a log with the expected settings."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        header = cast("dict[str, Any]", json.loads(lines[0]))
        differing = [key for key in expected if header.get(key) != expected[key]]
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise HyperAlignError(
            f"{path} is not the log of a scoring run ({first_line(error)}). Delete it, or give another --out."
        ) from error
    if differing:
        found = "; ".join(f"{key} {header.get(key)} instead of {expected[key]}" for key in differing)
        raise HyperAlignError(
            f"{path.name} contains scores made with {found}. Give another --out, or delete {path} to score "
            "all images again."
        )
    return lines[1:]


def _row(line: str, row: Callable[..., Row]) -> Row | None:
    """Returns a line's row, or None where an interruption cut the line off."""
    try:
        return row(**json.loads(line))
    except (ValueError, TypeError):
        return None
