"""Files that are there whole or not at all, and the log a scoring run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Protocol, TextIO, TypeVar, cast

from ...errors import HyperAlignError
from ...files import first_line

LOG_VERSION = 1


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file beside its target, and moves it into place.

    Raises HyperAlignError when the disk refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise HyperAlignError(
            f"{path} could not be written ({first_line(error)}). Make room or give another place; what was "
            "scored is kept, and the same command goes on from there."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Makes the folder of a file to come. Raises HyperAlignError when nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise HyperAlignError(
            f"{path} cannot be written ({first_line(error)}); give a place where files can be."
        ) from error


def file_state(path: Path) -> tuple[int, int]:
    """Returns what changes when a file is written, its size and its time in ns; zeros without a file."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Scored:
    """An image's scores, and what they were made of."""

    name: str
    """Relative to the folder."""
    prompt: str
    scores: dict[str, float]
    """By the rewards' names."""
    size: int
    modified: int
    """With `size` the image's `file_state`."""


class Named(Protocol):
    """A dataclass of what was found out about an image."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """The image's name."""
        ...


Row = TypeVar("Row", bound=Named)


class Log(AbstractContextManager["Log[Row]"], Generic[Row]):
    """Rows about images, one JSON line each, appended as they come.

    Args:
        path: of the log.
        settings: what all rows of a log have in common.
        row: the dataclass of a row.

    Raises:
        HyperAlignError: the log was written with other settings, or cannot be opened.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], row: Callable[..., Row]) -> None:
        header = {"version": LOG_VERSION, **settings}
        found = [_row(line, row) for line in _read(path, header)] if path.exists() else []
        self.rows = {row.name: row for row in found if row is not None}
        lines = [header, *(asdict(row) for row in self.rows.values())]
        # Written anew, a line that an interruption tore is gone before others follow it.
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
        self._stream: TextIO = path.open("a", encoding="utf-8")

    def append(self, rows: Sequence[Row]) -> None:
        """Keeps rows; from here on they outlive the process."""
        self._stream.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        self._stream.flush()
        self.rows |= {row.name: row for row in rows}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def log_of(path: Path) -> Path:
    """Returns where the log of a table or of results lies."""
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
            f"{path.name} holds scores made with {found}. Give another --out, or delete {path} to score anew."
        )
    return lines[1:]


def _row(line: str, row: Callable[..., Row]) -> Row | None:
    """Returns a line's row, or None where an interruption tore the line."""
    try:
        return row(**json.loads(line))
    except (ValueError, TypeError):
        return None
