"""Random access to the members of an uncompressed tar."""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path
from typing import Any, cast

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line, write_text

logger = logging.getLogger("hyperalign.train")


class TarIndex:
    """Offset and size of each file in a tar, cached beside it as `NAME.tar.index.json`."""

    def __init__(self, path: Path) -> None:
        """Reads the cached index, or builds it in one pass over the headers of the tar.

        Raises:
            HyperAlignError: the file is compressed, damaged or not a tar.
        """
        self.path = path
        self._entries = self._load() or self._build()
        # A listing may name images without the folder that they have in the tar.
        self._by_base: dict[str, list[str]] = {}
        for name in self._entries:
            self._by_base.setdefault(name.rpartition("/")[2], []).append(name)

    def read(self, name: str) -> bytes:
        """Returns the contents of a file by its full name, or by its base name if that is unique.

        Raises:
            OSError: no such file, or the tar ends before it does.
        """
        if name not in self._entries:
            alike = self._by_base.get(name.rpartition("/")[2], [])
            if len(alike) != 1:
                raise FileNotFoundError(f"{len(alike) or 'no'} files in it are called {name}")
            name = alike[0]
        start, size = self._entries[name]
        with self.path.open("rb") as tar:
            tar.seek(start)
            data = tar.read(size)
        if len(data) != size:
            raise OSError(f"the tar ends within {name}")
        return data

    @property
    def _cache(self) -> Path:
        return self.path.with_name(f"{self.path.name}.index.json")

    def _state(self) -> list[int]:
        stat = self.path.stat()
        return [stat.st_size, stat.st_mtime_ns]

    def _load(self) -> dict[str, tuple[int, int]] | None:
        try:
            cached = json.loads(self._cache.read_text(encoding="utf-8"))
            if cached["tar"] == self._state():
                return {str(name): (int(start), int(size)) for name, (start, size) in cached["files"].items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is built again: %s", self._cache, error)
        return None

    def _build(self) -> dict[str, tuple[int, int]]:
        logger.info("indexing %s", self.path)
        entries: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(self.path, "r:") as tar:
                while (member := tar.next()) is not None:
                    if member.isfile():
                        entries[member.name] = (member.offset_data, member.size)
                    cast(Any, tar).members.clear()  # tarfile would keep half a gigabyte of them
        except (tarfile.TarError, OSError) as error:
            raise HyperAlignError(
                f"{self.path} is not a whole uncompressed tar ({first_line(error)}). If it is compressed, "
                "unpack it with gunzip; otherwise download it again."
            ) from error
        try:
            write_text(self._cache, json.dumps({"tar": self._state(), "files": entries}))
        except OSError as error:
            logger.warning("the index is not saved and will be built again next time: %s", error)
        return entries
