"""What identifies the files of a model without reading gigabytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line

READ_WHOLE = (".json", ".txt", ".model")
"""Suffixes of configurations and tokenizers; the other files are weights."""
PIECES, PIECE_BYTES = 256, 4096
"""The fingerprint reads this many evenly spaced pieces of a file of weights: gigabytes take minutes."""


def files_digest(start: str, paths: Iterable[Path]) -> str:
    """Returns a hexadecimal hash of `start`, the names and sizes of files, and what they contain.

    Raises:
        HyperAlignError: a file cannot be read.
    """
    digest = hashlib.sha256(start.encode())
    for path in paths:
        digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}".encode())
        digest.update(_contents(path))
    return digest.hexdigest()


def _contents(path: Path) -> bytes:
    """Returns a file, or evenly spaced pieces of a large file of weights."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if path.suffix in READ_WHOLE or size <= PIECES * PIECE_BYTES:
                return file.read()
            pieces: list[bytes] = []
            for number in range(PIECES):
                file.seek((size - PIECE_BYTES) * number // (PIECES - 1))
                pieces.append(file.read(PIECE_BYTES))
    except OSError as error:
        raise HyperAlignError(f"{path} cannot be read ({first_line(error)}). Copy it again.") from error
    return b"".join(pieces)
