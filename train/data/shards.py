"""Latent shards: `.safetensors` files of encoded preference images, and the stream that training reads.

A shard holds `latents` (N, C, h, w) and a JSON header with captions, names, encoder and resolution.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hyperalign.checkpoint import save_atomically
from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line, write_text

logger = logging.getLogger("hyperalign.train")

FORMAT_VERSION = 1
HEADER_KEY = "hyperalign_latents"
INDEX_FILE = "index.json"
MAX_BAD_SHARE = 0.01
"""More than this share of bad shards or images ends a run."""
MIN_READ = 100
"""The share of bad images is checked once this many were read."""
SHUFFLE_WINDOW = 4
"""Shards that are mixed with each other at any position of the stream."""


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The JSON header of a shard."""

    captions: list[str]
    names: list[str]
    encoder: str
    """Fingerprint of the autoencoder and of how its latents are scaled."""
    resolution: int
    """Side of the square images, in pixels."""
    unit: str = ""
    """The unit of the dataset that it was made from."""
    unsafe: int = 0
    """Images skipped because the dataset marks them as unsafe."""
    unsafe_mark: str = ""
    """The filter they matched, such as `nsfw > 0.5`; empty without a filter."""
    version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What `index.json` keeps of a shard; `state` is its size and modification time."""

    state: list[int]
    shape: list[int]
    encoder: str
    resolution: int


def shard_path(folder: Path, unit: int) -> Path:
    """Returns the path of the shard of a unit."""
    return folder / f"shard-{unit:06d}.safetensors"


def write_shard(path: Path, latents_NCHW: Tensor, header: ShardHeader) -> None:
    """Writes a shard atomically. Raises OSError."""
    save_atomically({"latents": latents_NCHW.contiguous()}, path, {HEADER_KEY: json.dumps(asdict(header))})


def read_shard_header(path: Path) -> tuple[ShardHeader, tuple[int, ...]]:
    """Returns header and shape (N, C, h, w) without reading a latent.

    Raises:
        HyperAlignError: not a whole latent shard of this version.
    """
    header, shape, _ = _open_shard(path)
    return header, shape


class LatentShards:
    """The shards of a folder as one endless shuffled stream of images.

    The image at a position of the stream depends on the seed and the shards alone, so a run resumes at a
    position on any number of processes.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str | None = None,
        resolution: int | None = None,
        window: int = SHUFFLE_WINDOW,
    ) -> None:
        """Reads the headers of the shards, of unchanged ones from `index.json`.

        Args:
            folder: the output of train/encode.py.
            fingerprint: the expected encoder; None accepts any.
            resolution: the expected side of the images, in pixels; None accepts any.
            window: shards that are mixed with each other at any position of the stream.

        Raises:
            HyperAlignError: there is no shard or none with an image, too many are damaged, or one has another
                encoder, resolution or shape.
        """
        self.folder = folder
        self.window = window
        infos, self.damaged = _index(folder)
        _check_damaged(folder, self.damaged, len(infos) + len(self.damaged))
        infos = {name: info for name, info in infos.items() if info.shape[0]}
        if not infos:
            raise HyperAlignError(f"{folder} holds no encoded image. Make them with train/encode.py.")
        first = next(iter(infos.values()))
        self.fingerprint = fingerprint or first.encoder
        self.resolution = resolution or first.resolution
        self.shape = tuple(first.shape[1:])
        """(C, h, w) of a latent."""
        for name, info in infos.items():
            self._check(folder / name, info)
        self.names = list(infos)
        self.counts = np.array([info.shape[0] for info in infos.values()])
        self._ends = np.cumsum(self.counts)
        self._shard = lru_cache(maxsize=2 * window + 2)(self._open)
        self._order = lru_cache(maxsize=2)(self.order)
        self._requested = self._unreadable = 0

    def __len__(self) -> int:
        return int(self._ends[-1])

    def captions(self) -> list[str]:
        """Returns the distinct captions; reads the header of every shard.

        Raises:
            HyperAlignError: a shard was damaged since the folder was opened.
        """
        headers = (read_shard_header(self.folder / name)[0] for name in self.names)
        return list(dict.fromkeys(caption for header in headers for caption in header.captions))

    def unsafe_summary(self) -> str:
        """Returns how many images were excluded as unsafe and by which filter; reads every header.

        Raises:
            HyperAlignError: a shard was damaged since the folder was opened.
        """
        headers = [read_shard_header(self.folder / name)[0] for name in self.names]
        filters = sorted({header.unsafe_mark for header in headers if header.unsafe_mark})
        count, listed = sum(header.unsafe for header in headers), ", ".join(filters)
        return f"{count} of {count + len(self)} images excluded as unsafe ({listed})" if filters else ""

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Returns the indices of all images, shuffled so that any stretch of them touches few shards.

        The shards are permuted; an image of the k-th is sorted by k plus a uniform share of the window.
        """
        rng = np.random.default_rng((seed, epoch))
        places = np.repeat(rng.permutation(len(self.counts)), self.counts)
        return np.argsort(places + self.window * rng.random(len(self)), kind="stable")

    def batch(self, position: int, count: int, seed: int) -> list[int]:
        """Returns the indices of the images at positions [position, position + count) of the stream."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, start = divmod(position + len(indices), len(self))
            indices += self._order(seed, epoch)[start : start + count - len(indices)].tolist()
        return indices

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Returns latents (B, C, h, w) as they are stored, and captions.

        An image that cannot be read is replaced by another one of the batch and named in the log.

        Raises:
            HyperAlignError: more than 1 % of the images requested so far could not be read.
        """
        found = [self._image(index) for index in indices]
        good = [image for image in found if image is not None]
        self._requested += len(found)
        self._unreadable += len(found) - len(good)
        too_many = self._requested >= MIN_READ and self._unreadable > MAX_BAD_SHARE * self._requested
        if too_many or not good:
            raise HyperAlignError(
                f"{self._unreadable} of {self._requested} images could not be read from {self.folder}; at "
                "most 1 % may be bad. The log names the shards: delete them and run train/encode.py again."
            )
        whole = [image or good[i % len(good)] for i, image in enumerate(found)]
        return torch.stack([latent for latent, _ in whole]), [caption for _, caption in whole]

    def _open(self, number: int) -> tuple[ShardHeader, tuple[int, ...], Any]:
        return _open_shard(self.folder / self.names[number])

    def _image(self, index: int) -> tuple[Tensor, str] | None:
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[number] - self.counts[number])
        try:
            header, _, file = self._shard(number)
            latent = cast(Tensor, file.get_slice("latents")[row]).clone()
            if not bool(torch.isfinite(latent).all()):
                raise HyperAlignError(f"its row {row} is not finite")
        except (SafetensorError, OSError, HyperAlignError) as error:
            logger.warning("skipped an image of %s: %s", self.folder / self.names[number], first_line(error))
            return None
        return latent, header.captions[row]

    def _check(self, path: Path, info: ShardInfo) -> None:
        for what, found, expected in (
            ("encoded by", info.encoder, self.fingerprint),
            ("of images with a side of", info.resolution, self.resolution),
            ("of latents of the shape", tuple(info.shape[1:]), self.shape),
        ):
            if found != expected:
                raise HyperAlignError(
                    f"{path} is {what} {found}; expected {expected}. Encode the images for this recipe "
                    "into another folder with train/encode.py."
                )


def _open_shard(path: Path) -> tuple[ShardHeader, tuple[int, ...], Any]:
    try:
        file: Any = safe_open(str(path), framework="pt")
        raw = json.loads((file.metadata() or {})[HEADER_KEY])
        shape = tuple(cast("list[int]", file.get_slice("latents").get_shape()))
        header = ShardHeader(**raw)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise HyperAlignError(f"{path} is not a whole latent shard: {first_line(error)}") from error
    if header.version != FORMAT_VERSION or not len(header.captions) == len(header.names) == shape[0]:
        raise HyperAlignError(
            f"{path} is a latent shard of version {header.version} with {shape[0]} latents and "
            f"{len(header.captions)} captions; expected version {FORMAT_VERSION} and as many of both."
        )
    return header, shape, file


def _index(folder: Path) -> tuple[dict[str, ShardInfo], dict[str, str]]:
    """Returns the facts of all whole shards, and why the others are damaged, both by file name."""
    if not folder.is_dir():
        raise HyperAlignError(f"There is no folder {folder} of encoded images. Make it with train/encode.py.")
    stored = _stored_index(folder / INDEX_FILE)
    infos: dict[str, ShardInfo] = {}
    damaged: dict[str, str] = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
        if path.name in stored and stored[path.name].state == state:
            infos[path.name] = stored[path.name]
            continue
        try:
            header, shape = read_shard_header(path)
            infos[path.name] = ShardInfo(state, list(shape), header.encoder, header.resolution)
        except HyperAlignError as error:
            logger.warning("skipped a shard: %s", error)
            damaged[path.name] = str(error)
    if infos != stored:
        try:
            table = {name: asdict(info) for name, info in infos.items()}
            write_text(folder / INDEX_FILE, json.dumps(table))
        except OSError as error:
            logger.warning("the index of %s is not saved: %s", folder, error)
    return infos, damaged


def _stored_index(path: Path) -> dict[str, ShardInfo]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {name: ShardInfo(**info) for name, info in table.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is built again: %s", path, error)
        return {}


def _check_damaged(folder: Path, damaged: dict[str, str], total: int) -> None:
    if len(damaged) > MAX_BAD_SHARE * total:
        raise HyperAlignError(
            f"{len(damaged)} of {total} shards in {folder} are damaged, first {next(iter(damaged))}; at most "
            "1 % may be. Delete them and run train/encode.py again: it makes only what is missing."
        )
