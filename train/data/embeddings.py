"""Prompt embeddings on disk: computed once, so that training needs no memory for the text encoders."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
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
from hyperalign.files import cannot_write, first_line, free_bytes
from train.models.base import Conditions
from train.transfer import to_device

logger = logging.getLogger("hyperalign.train")

PROMPTS_PER_FILE = 64
HEADER_KEY = "prompts"
Encode = Callable[[Sequence[str], int], Conditions]
"""Prompts and the length they are padded to -> conditions, one row per prompt."""


def prompt_key(prompt: str) -> str:
    """Returns the name of a prompt in the cache."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:24]


@dataclass(slots=True)
class EmbeddingCache:
    """The conditions of prompts at one padding, in a folder of `.safetensors` files."""

    folder: Path
    _rows: dict[str, tuple[Path, int]] = field(default_factory=dict[str, tuple[Path, int]])
    _files: dict[Path, Any] = field(default_factory=dict[Path, Any])

    def __post_init__(self) -> None:
        """Reads the headers of the files; the prompts of a damaged file are encoded again."""
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Returns the prompts without conditions, each once, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt_key(prompt) not in self._rows]

    def add(self, prompts: Sequence[str], conditions: Conditions) -> None:
        """Writes the conditions of prompts to one file. Raises HyperAlignError, for one on a full disk."""
        keys = [prompt_key(prompt) for prompt in prompts]
        path = self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:24]}.safetensors"
        tensors = {name: value.detach().cpu().contiguous() for name, value in conditions.items()}
        fix = (
            f"{free_bytes(path) / 2**30:.2f} GiB are free there. Make room, or set data.embeddings to "
            "another disk, and run the same command again: embeddings that are written stay."
        )
        with cannot_write(path, fix):
            save_atomically(tensors, path, {HEADER_KEY: json.dumps(keys)})
        self._index(path)

    def read(self, prompts: Sequence[str]) -> Conditions:
        """Returns the prompts' conditions. Raises HyperAlignError if one is missing."""
        rows = [self._row(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, prompt: str) -> Conditions:
        if prompt_key(prompt) not in self._rows:
            raise HyperAlignError(
                f"The embeddings in {self.folder} lack the prompt {prompt!r}. Run the same command again."
            )
        path, row = self._rows[prompt_key(prompt)]
        if path not in self._files:
            self._files[path] = safe_open(str(path), framework="pt")
        file = self._files[path]
        return {name: cast(Tensor, file.get_slice(name)[row]) for name in file.keys()}

    def _index(self, path: Path) -> None:
        try:
            with safe_open(str(path), framework="pt") as file:
                keys: list[str] = json.loads((file.metadata() or {})[HEADER_KEY])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            # Not removed: another process may have replaced it by a whole file meanwhile.
            logger.warning("skipped %s, its prompts are encoded again: %s", path, first_line(error))
            return
        self._rows |= {key: (path, row) for row, key in enumerate(keys)}


class CachedPromptEncoder:
    """Conditions from the cache, behind the `PromptEncoder` protocol."""

    def __init__(self, folder: Path, lengths: Sequence[int], device: torch.device) -> None:
        self.caches = {length: EmbeddingCache(folder / str(length)) for length in lengths}
        self.device = device

    def fill(self, prompts: Sequence[str], encode: Encode, rank: int = 0, world: int = 1) -> None:
        """Encodes this process's share of the prompts that are not cached yet.

        The prompt alone decides which process encodes it, so no prompt is skipped when the processes open
        the folder at different times. Raises HyperAlignError if the folder cannot be written to.
        """
        own = [prompt for prompt in prompts if int(prompt_key(prompt), 16) % world == rank]
        for length, cache in self.caches.items():
            missing = cache.missing(own)
            for first in range(0, len(missing), PROMPTS_PER_FILE):
                chunk = missing[first : first + PROMPTS_PER_FILE]
                cache.add(chunk, encode(chunk, length))

    def at(self, length: int) -> CachedPromptEncoder:
        """Returns the same conditions at one padding: a prompt's then do not depend on its batch."""
        one = copy.copy(self)
        one.caches = {length: self.caches[length]}
        return one

    def count_missing(self, prompts: Sequence[str]) -> list[int]:
        """Returns how many conditions must still be computed for each padding."""
        return [len(cache.missing(prompts)) for cache in self.caches.values()]

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Returns the prompts' conditions on the device, all at one padding.

        The prompts decide the padding, so it varies over steps and is the same in a resumed run: hosts pad
        T5 differently, and the hypernetwork must not depend on one of them.
        """
        lengths = list(self.caches)
        length = lengths[zlib.crc32("\n".join(prompts).encode()) % len(lengths)]
        return {
            name: to_device(value, self.device) for name, value in self.caches[length].read(prompts).items()
        }
