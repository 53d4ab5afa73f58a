"""Text encoders' outputs on disk: computed once, so that the encoders need no memory while training."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hyperalign.checkpoint import save_atomically
from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from train.models.base import Conditions

logger = logging.getLogger("hyperalign.train")

SHARD = 64
"""Prompts in one file."""
KEYS = "prompts"
Encode = Callable[[Sequence[str], int], Conditions]
"""Prompts and a padding -> conditions, one row a prompt."""


def key_of(prompt: str) -> str:
    """Returns a prompt's name in the cache."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:24]


@dataclass(slots=True)
class EmbeddingCache:
    """The conditions of prompts at one padding, in a folder of shards."""

    folder: Path
    _rows: dict[str, tuple[Path, int]] = field(default_factory=dict[str, tuple[Path, int]])
    _files: dict[Path, Any] = field(default_factory=dict[Path, Any])

    def __post_init__(self) -> None:
        """Reads the headers of the shards; a damaged shard is forgotten and computed anew."""
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Returns the prompts that are not here, each once, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if key_of(prompt) not in self._rows]

    def add(self, prompts: Sequence[str], conditions: Conditions) -> None:
        """Writes the conditions of up to `SHARD` prompts. Raises HyperAlignError, as on a full disk."""
        keys = [key_of(prompt) for prompt in prompts]
        path = self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:24]}.safetensors"
        tensors = {name: value.detach().cpu().contiguous() for name, value in conditions.items()}
        try:
            save_atomically(tensors, path, {KEYS: json.dumps(keys)})
        except (SafetensorError, OSError) as error:
            raise self._unwritable(path, error) from error
        self._index(path)

    def read(self, prompts: Sequence[str]) -> Conditions:
        """Returns the prompts' conditions. Raises HyperAlignError if one is not here."""
        rows = [self._row(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, prompt: str) -> Conditions:
        if key_of(prompt) not in self._rows:
            raise HyperAlignError(
                f"The embeddings in {self.folder} lack the prompt {prompt!r}. Run the same command again."
            )
        path, row = self._rows[key_of(prompt)]
        if path not in self._files:
            self._files[path] = safe_open(str(path), framework="pt")
        file = self._files[path]
        return {name: cast(Tensor, file.get_slice(name)[row]) for name in file.keys()}

    def _index(self, path: Path) -> None:
        try:
            with safe_open(str(path), framework="pt") as file:
                keys: list[str] = json.loads((file.metadata() or {})[KEYS])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            # Not removed: another process may have put a whole one in its place by now.
            logger.warning("%s is left aside, its prompts are encoded again: %s", path, first_line(error))
            return
        self._rows |= {key: (path, row) for row, key in enumerate(keys)}

    def _unwritable(self, path: Path, error: BaseException) -> HyperAlignError:
        existing = next(folder for folder in self.folder.resolve().parents if folder.is_dir())
        free = shutil.disk_usage(existing).free / 2**30
        return HyperAlignError(
            f"The embeddings {path} cannot be written ({first_line(error)}); {free:.2f} GiB are free there. "
            "Make room, or set data.embeddings to another disk, and run the same command again: embeddings "
            "that are written stay."
        )


class CachedTexts:
    """Conditions from the cache, behind the `Texts` protocol."""

    def __init__(self, folder: Path, lengths: Sequence[int], device: torch.device) -> None:
        self.caches = {length: EmbeddingCache(folder / str(length)) for length in lengths}
        self.device = device

    def fill(self, prompts: Sequence[str], encode: Encode, rank: int = 0, world: int = 1) -> None:
        """Encodes this process's share of the prompts that are not cached yet.

        A prompt's process is decided by the prompt alone, so that none is passed over while the
        processes see the folder grow. Raises HyperAlignError if the folder cannot be written to.
        """
        own = [prompt for prompt in prompts if int(key_of(prompt), 16) % world == rank]
        for length, cache in self.caches.items():
            missing = cache.missing(own)
            for first in range(0, len(missing), SHARD):
                chunk = missing[first : first + SHARD]
                cache.add(chunk, encode(chunk, length))

    def lacking(self, prompts: Sequence[str]) -> int:
        """Returns how many conditions are still to be computed, over all paddings."""
        return sum(len(cache.missing(prompts)) for cache in self.caches.values())

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Returns the prompts' conditions on the device, all at one padding.

        The padding is decided by the prompts, so that it varies over steps and a resumed run sees
        the same: hosts pad T5 differently, and the hypernetwork must not learn one of them.
        """
        lengths = list(self.caches)
        length = lengths[zlib.crc32("\n".join(prompts).encode()) % len(lengths)]
        return {name: value.to(self.device) for name, value in self.caches[length].read(prompts).items()}
