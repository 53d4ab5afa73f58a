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
    """Where each file of a tar begins and ends, found once and kept beside it as `NAME.tar.index.json`."""

    def __init__(self, path: Path) -> None:
        """Reads the index, or makes it by one pass over the tar's headers.

        Raises:
            HyperAlignError: compressed, broken or not a tar.
        """
        self.path = path
        places = self._load() or self._build()
        self._places = places
        # images are told apart by their base name where the tar puts a folder before it
        self._by_base: dict[str, list[str]] = {}
        for name in places:
            self._by_base.setdefault(name.rpartition("/")[2], []).append(name)

    def read(self, name: str) -> bytes:
        """Returns the contents of a file, by its full name or by its base name if only one has it.

        Raises:
            OSError: no such file, or the tar ends before it does.
        """
        if name not in self._places:
            alike = self._by_base.get(name.rpartition("/")[2], [])
            if len(alike) != 1:
                raise FileNotFoundError(f"{len(alike) or 'no'} files in it are called {name}")
            name = alike[0]
        start, size = self._places[name]
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
            kept = json.loads(self._cache.read_text(encoding="utf-8"))
            if kept["tar"] == self._state():
                return {str(name): (int(start), int(size)) for name, (start, size) in kept["files"].items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is made anew: %s", self._cache, error)
        return None

    def _build(self) -> dict[str, tuple[int, int]]:
        logger.info("indexing %s", self.path)
        places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(self.path, "r:") as tar:
                while (member := tar.next()) is not None:
                    if member.isfile():
                        places[member.name] = (member.offset_data, member.size)
                    cast(Any, tar).members.clear()  # tarfile would keep half a gigabyte of them
        except (tarfile.TarError, OSError) as error:
            raise HyperAlignError(
                f"{self.path} is not a whole uncompressed tar ({first_line(error)}). If it is compressed, "
                "unpack it with gunzip; otherwise fetch it again."
            ) from error
        try:
            write_text(self._cache, json.dumps({"tar": self._state(), "files": places}))
        except OSError as error:
            logger.warning("the index is not kept, it will be made again next time: %s", error)
        return places
