"""The values of images on disk, from which an interrupted evaluation resumes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from hyperalign.files import cannot_write

RESUME = "Free some space; the values so far are kept, and the same command resumes from them."


class Cache(AbstractContextManager["Cache"]):
    """The values of one scorer by the key of what they were computed from.

    Every process reads all files and appends each batch to a file of its own, so that none waits for another.
    A line that an interruption cut off is ignored.

    Args:
        folder: of the files; it is made.
        name: of the scorer and what identifies its weights.
        process: number of this process.

    Raises:
        HyperAlignError: the folder or a file in it cannot be read or written.
    """

    def __init__(self, folder: Path, name: str, process: int) -> None:
        self._path = folder / f"{name}.{process}.jsonl"
        self.values: dict[str, float] = {}
        with cannot_write(self._path, RESUME):
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob(f"{name}.*.jsonl")):
                self.values.update(_read(path.read_text(encoding="utf-8", errors="replace")))
            self._stream = self._path.open("a", encoding="utf-8")

    def append(self, values: Mapping[str, float]) -> None:
        """Appends values; after that they survive the end of the process. Raises HyperAlignError."""
        with cannot_write(self._path, RESUME):
            # The line feed comes first: it ends a line that an interruption cut off.
            self._stream.write("".join(f"\n{json.dumps(item)}" for item in values.items()) + "\n")
            self._stream.flush()
        self.values.update(values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def _read(text: str) -> Iterable[tuple[str, float]]:
    """Yields the whole lines of a file."""
    for line in text.splitlines():
        try:
            found: Any = json.loads(line)
        except ValueError:
            continue
        match found:
            case [str() as key, float() as value]:
                yield key, value
            case _:
                continue
