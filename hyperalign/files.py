"""Files of the whole project: written whole or not at all, and errors of the disk in one sentence."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import HyperAlignError


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a path beside `path` to write to, which replaces `path` when the block ends well.

    A reader sees the old file or the whole new one; after an exception the old one stands. Several processes
    may write the same file at once. The folder is made.

    Args:
        path: the file to write.
        durable: waits until the disk has it, so that it outlives a power failure.

    Raises:
        OSError: the disk refuses; `cannot_write` makes a sentence of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if durable:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # what ends the block says more
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Writes a text file in UTF-8, whole or not at all. Raises OSError."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all. Raises OSError."""
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def cannot_write(path: Path, fix: str) -> Iterator[None]:
    """Turns an OSError of the block into a HyperAlignError that ends with `fix`, a whole sentence."""
    try:
        yield
    except OSError as error:
        raise HyperAlignError(f"{path} cannot be written ({first_line(error)}). {fix}") from error


def check_writable(path: Path, fix: str = "Choose a path that can be written to.") -> None:
    """Makes the folder of a file to come and tries to write there. Raises HyperAlignError."""
    with cannot_write(path, fix):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink(missing_ok=True)  # another machine may use the same process number


def is_file(path: Path) -> bool:
    """Returns whether a file is there; a path from a file may be none that a system knows."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a zero in it
        return False


def file_state(path: Path) -> tuple[int, int]:
    """Returns a file's size in bytes and modification time in ns; zeros if there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def existing_parent(path: Path) -> Path:
    """Returns a path, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.resolve().parents) if place.exists())


def free_bytes(path: Path) -> int:
    """Returns the free space of the disk on which a path is or will be."""
    return shutil.disk_usage(existing_parent(path)).free


def first_line(error: BaseException) -> str:
    """Returns an exception's message, or its class if it has none, on one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
