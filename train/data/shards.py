"""Latent shards: `.safetensors` files of encoded preference images, and the stream that training reads.

A shard holds for each bucket `latents_HEIGHTxWIDTH` (N, C, h, w), and a JSON header with the buckets,
captions, names, encoder and resolution. Version 1 has squares alone, as `latents`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hyperalign.checkpoint import save_atomically
from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line, write_text
from train.data.buckets import Bucket
from train.data.order import ImageOrder

logger = logging.getLogger("hyperalign.train")

FORMAT_VERSION = 2
READABLE = (1, 2)
HEADER_KEY = "hyperalign_latents"
INDEX_FILE = "index.json"
MAX_BAD_SHARE = 0.01
"""More than this share of bad shards or images ends a run."""
MIN_READ = 100
"""The share of bad images is checked once this many were read."""
SHUFFLE_WINDOW = 4
"""Shards that are mixed with each other at any position of the stream."""
SHOWN = 3
"""Buckets that a summary names."""


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The JSON header of a shard."""

    captions: list[str]
    """Of the images in the order of the buckets."""
    names: list[str]
    encoder: str
    """Fingerprint of the autoencoder and of how its latents are scaled."""
    resolution: int
    """Side of the square, in pixels; other buckets have about as many pixels."""
    unit: str = ""
    """The unit of the dataset that it was made from."""
    unsafe: int = 0
    """Images skipped because the dataset marks them as unsafe."""
    unsafe_mark: str = ""
    """The filter they matched, such as `nsfw > 0.5`; empty without a filter."""
    version: int = FORMAT_VERSION
    buckets: list[list[int]] = field(default_factory=list[list[int]])
    """Height and width of each bucket, in pixels, and how many images it has."""
    bucketed: bool = False
    """Whether images went to the bucket of their ratio; otherwise all were cropped to the square."""
    min_side: int = 0
    """Images smaller than this were left out."""
    too_small: int = 0
    """How many that were."""
    enlarged: int = 0
    """Images that were enlarged, which blurs them."""
    pairs: bool = False
    """Whether each image has the one that it won against, in `rejected_HEIGHTxWIDTH`."""

    def sizes(self) -> dict[Bucket, int]:
        """Returns each bucket with its number of images."""
        return {(height, width): count for height, width, count in self.buckets}

    def caption(self, bucket: Bucket, row: int) -> str:
        """Returns the caption of a row of a bucket's latents."""
        before = takewhile(lambda each: tuple(each[:2]) != bucket, self.buckets)
        return self.captions[sum(count for *_, count in before) + row]


Shapes = dict[Bucket, list[int]]
"""The shape (N, C, h, w) of each bucket's latents."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What `index.json` keeps of a shard; `state` is its size and modification time."""

    state: list[int]
    shapes: list[list[int]]
    """Of each bucket: its height and width in pixels, then N, C, h, w of its latents."""
    encoder: str
    resolution: int

    def by_bucket(self) -> Shapes:
        """Returns the shapes of the latents."""
        return {(height, width): shape for height, width, *shape in self.shapes}


def shard_path(folder: Path, unit: int) -> Path:
    """Returns the path of the shard of a unit."""
    return folder / f"shard-{unit:06d}.safetensors"


def write_shard(
    path: Path,
    latents: Mapping[Bucket, Tensor],
    header: ShardHeader,
    rejected: Mapping[Bucket, Tensor] | None = None,
) -> None:
    """Writes the latents (N, C, h, w) of each bucket, and of pairs those that lost, atomically.

    Raises OSError.
    """
    buckets = [[*bucket, len(latents_NCHW)] for bucket, latents_NCHW in latents.items()]
    tensors = {latents_name(bucket): latents_NCHW.contiguous() for bucket, latents_NCHW in latents.items()}
    tensors |= {
        rejected_name(bucket): latents_NCHW.contiguous() for bucket, latents_NCHW in (rejected or {}).items()
    }
    save_atomically(tensors, path, {HEADER_KEY: json.dumps(asdict(replace(header, buckets=buckets)))})


def latents_name(bucket: Bucket) -> str:
    """Returns the name of a bucket's latents in a shard."""
    return f"latents_{bucket[0]}x{bucket[1]}"


def rejected_name(bucket: Bucket) -> str:
    """Returns the name of the latents that lost against a bucket's."""
    return f"rejected_{bucket[0]}x{bucket[1]}"


def read_shard_header(path: Path) -> tuple[ShardHeader, Shapes]:
    """Returns header and shapes without reading a latent.

    Raises:
        HyperAlignError: not a whole latent shard of this version.
    """
    header, shapes, _ = _open_shard(path)
    return header, shapes


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
            resolution: the expected side of the square, in pixels; None accepts any.
            window: shards that are mixed with each other at any position of the stream.

        Raises:
            HyperAlignError: there is no shard or none with an image, too many are damaged, or one has another
                encoder, resolution or shape.
        """
        self.folder = folder
        infos, self.damaged = _index(folder)
        _check_damaged(folder, self.damaged, len(infos) + len(self.damaged))
        infos = {name: info for name, info in infos.items() if any(shape[2] for shape in info.shapes)}
        if not infos:
            raise HyperAlignError(f"{folder} holds no encoded image. Make them with train/encode.py.")
        first = next(iter(infos.values()))
        self.fingerprint = fingerprint or first.encoder
        self.resolution = resolution or first.resolution
        self.shapes: dict[Bucket, tuple[int, ...]] = {}
        """(C, h, w) of the latents of each bucket, by its height and width in pixels."""
        for name, info in infos.items():
            self._check(folder / name, info)
        self.names = list(infos)
        self.buckets = sorted(self.shapes)
        counts = [
            [info.by_bucket().get(bucket, [0])[0] for bucket in self.buckets] for info in infos.values()
        ]
        self.images = ImageOrder(np.array(counts, dtype=np.int64), window)
        self._ends = np.cumsum(self.images.counts_SK.sum(axis=1))
        self._shard = lru_cache(maxsize=2 * window + 2)(self._open)
        self._requested = self._unreadable = 0

    def __len__(self) -> int:
        return self.images.total

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

    def sizes(self) -> str:
        """Returns how many images each bucket has, the largest first, and what was left out or enlarged.

        Reads every header. Raises HyperAlignError if a shard was damaged since the folder was opened.
        """
        headers = [read_shard_header(self.folder / name)[0] for name in self.names]
        ordered = sorted(zip(self.images.sizes_K.tolist(), self.buckets, strict=True), reverse=True)
        listed = [f"{count} of {width} x {height}" for count, (height, width) in ordered]
        shown = ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more sizes" * (len(listed) > SHOWN))
        parts, least = [f"{len(self)} images ({shown})"], max(header.min_side for header in headers)
        if least:
            parts.append(f"{sum(header.too_small for header in headers)} left out as smaller than {least}")
        if enlarged := sum(header.enlarged for header in headers):
            parts.append(f"{enlarged} enlarged")
        return ", ".join(parts)

    def batch(self, position: int, count: int, seed: int) -> list[int]:
        """Returns the numbers of `count` images of one bucket; `position` images were read before."""
        return self.images.batch(position, count, seed)

    def check_pairs(self) -> None:
        """Reads every header. Raises HyperAlignError if a shard holds single images."""
        for name in self.names:
            if not read_shard_header(self.folder / name)[0].pairs:
                raise HyperAlignError(
                    f"{self.folder / name} holds images without the ones that they won against; the method "
                    "compares both. Encode the dataset into another folder with train/encode.py --pairs."
                )

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Returns latents (B, C, h, w) of images of one bucket, as they are stored, and captions.

        An image that cannot be read is replaced by another one of the batch and named in the log.

        Raises:
            HyperAlignError: more than 1 % of the images requested so far could not be read.
        """
        latents, captions = self._read(indices, latents_of)
        return latents[0], captions

    def read_pairs(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        """Returns `read`'s latents, those that lost against them, and captions. Raises HyperAlignError."""
        (latents, rejected), captions = self._read(indices, pair_of)
        return latents, rejected, captions

    def _read(self, indices: Sequence[int], names: StoredNames) -> tuple[list[Tensor], list[str]]:
        found = [self._image(index, names) for index in indices]
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
        stacked = [torch.stack(each) for each in zip(*(latents for latents, _ in whole), strict=True)]
        return stacked, [caption for _, caption in whole]

    def _open(self, number: int) -> tuple[ShardHeader, Shapes, Any]:
        return _open_shard(self.folder / self.names[number])

    def _image(self, index: int, names: StoredNames) -> tuple[list[Tensor], str] | None:
        number = int(np.searchsorted(self._ends, index, side="right"))
        counts_K = self.images.counts_SK[number]
        row = index - int(self._ends[number] - counts_K.sum())
        starts = list(accumulate(counts_K.tolist(), initial=0))
        place = int(np.searchsorted(starts, row, side="right")) - 1
        bucket, row = self.buckets[place], row - starts[place]
        try:
            header, _, file = self._shard(number)
            stored = (file.get_slice(name)[row] for name in names(header, bucket))
            latents = [cast(Tensor, latent).clone() for latent in stored]
            if not all(bool(torch.isfinite(latent).all()) for latent in latents):
                raise HyperAlignError(f"its row {row} is not finite")
        except (SafetensorError, OSError, HyperAlignError) as error:
            logger.warning("skipped an image of %s: %s", self.folder / self.names[number], first_line(error))
            return None
        return latents, header.caption(bucket, row)

    def _check(self, path: Path, info: ShardInfo) -> None:
        channels = next(iter(self.shapes.values()), info.shapes[0][3:])[0]
        facts: list[tuple[str, object, object]] = [
            ("encoded by", info.encoder, self.fingerprint),
            ("of images with a side of", info.resolution, self.resolution),
        ]
        for bucket, (count, *shape) in info.by_bucket().items():
            expected = self.shapes.setdefault(bucket, (channels, *shape[1:])) if count else tuple(shape)
            facts.append(("of latents of the shape", tuple(shape), expected))
        for what, found, expected in facts:
            if found != expected:
                raise HyperAlignError(
                    f"{path} is {what} {found}; expected {expected}. Encode the images for this recipe "
                    "into another folder with train/encode.py."
                )


def _open_shard(path: Path) -> tuple[ShardHeader, Shapes, Any]:
    try:
        file: Any = safe_open(str(path), framework="pt")
        header = ShardHeader(**json.loads((file.metadata() or {})[HEADER_KEY]))
        if header.version == 1:
            count = cast("list[int]", file.get_slice("latents").get_shape())[0]
            header = replace(header, buckets=[[header.resolution, header.resolution, count]])
        shapes = {bucket: _shape(file, header, bucket) for bucket in header.sizes()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise HyperAlignError(f"{path} is not a whole latent shard: {first_line(error)}") from error
    count = sum(shape[0] for shape in shapes.values())
    counts = {count, sum(header.sizes().values()), len(header.captions), len(header.names)}
    if header.version not in READABLE or len(counts) > 1:
        raise HyperAlignError(
            f"{path} is a latent shard of version {header.version} with {count} latents and "
            f"{len(header.captions)} captions; expected version {FORMAT_VERSION} and as many of both."
        )
    return header, shapes, file


def _stored_name(header: ShardHeader, bucket: Bucket) -> str:
    return "latents" if header.version == 1 else latents_name(bucket)


StoredNames = Callable[["ShardHeader", Bucket], list[str]]
"""Which of a bucket's tensors are read."""


def latents_of(header: ShardHeader, bucket: Bucket) -> list[str]:
    """Returns the name of the images' latents."""
    return [_stored_name(header, bucket)]


def pair_of(header: ShardHeader, bucket: Bucket) -> list[str]:
    """Returns the names of the images' latents and of those that lost against them."""
    return [_stored_name(header, bucket), rejected_name(bucket)]


def _shape(file: Any, header: ShardHeader, bucket: Bucket) -> list[int]:
    return cast("list[int]", file.get_slice(_stored_name(header, bucket)).get_shape())


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
            header, shapes = read_shard_header(path)
            table = [[*bucket, *shape] for bucket, shape in shapes.items()]
            infos[path.name] = ShardInfo(state, table, header.encoder, header.resolution)
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
