"""Encodes a preference dataset to latent shards, one per unit of the dataset; finished shards are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.files import cannot_write, check_writable, free_bytes
from hyperalign.threads import Threads
from train.data.bad_images import BadImages
from train.data.buckets import Bucket, enlargement, nearest_bucket
from train.data.preference.dataset import (
    BadImage,
    DatasetItem,
    PreferenceDataset,
    UnreadableUnit,
    UnsafeFilter,
    UnsafeImage,
)
from train.data.preference.decoding import decode
from train.data.shards import MAX_BAD_SHARE, ShardHeader, read_shard_header, shard_path, write_shard
from train.models.image_encoder import ImageEncoder

logger = logging.getLogger("hyperalign.train")


@dataclass(slots=True)
class Counts:
    """The units and images of one process."""

    units: int = 0
    """Units that have their shard, including those of earlier runs."""
    reused: int = 0
    """Units whose shard was made by an earlier run."""
    unreadable: int = 0
    """Units that could not be read to their end; they have no shard."""
    images: int = 0
    """Images encoded in this run."""
    bad: int = 0
    """Images skipped because they cannot be used; bad.jsonl lists them."""
    too_small: int = 0
    """Images left out because they are smaller than `min_side`."""
    enlarged: int = 0
    """Images that are smaller than their bucket and were enlarged."""
    unsafe: int = 0
    """Images skipped because the dataset marks them as unsafe."""


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image ready for the encoder: of the size of its bucket, RGB, (H, W, 3) bytes."""

    caption: str
    name: str
    pixels_HWC: NDArray[np.uint8]
    enlarged: bool
    rejected_HWC: NDArray[np.uint8] | None = None
    """The image that lost against it, in the same size."""

    @property
    def bucket(self) -> Bucket:
        """Height and width."""
        height, width, _ = self.pixels_HWC.shape
        return height, width


Prepared: TypeAlias = "PreparedImage | BadImage | UnsafeImage | None"
"""An image, why there is none, or None for one that is too small."""


def encode_dataset(
    dataset: PreferenceDataset,
    encoder: ImageEncoder,
    out: Path,
    *,
    rank: int = 0,
    world: int = 1,
    batch: int = 16,
    workers: int = 8,
    min_side: int = 0,
    buckets: Sequence[Bucket] | None = None,
    unsafe: UnsafeFilter | None = None,
    pairs: bool = False,
    dtype: torch.dtype = torch.float16,
    progress: Callable[[Counts], None] | None = None,
) -> Counts:
    """Writes the missing shards of units rank, rank + world, ...

    A shard depends on its unit alone, so an interrupted run resumes where it stopped, on any number of
    processes. Images are resized until they cover their bucket, and cropped in the middle.

    Args:
        dataset: the images.
        encoder: the autoencoder of the base model.
        out: folder of the shards; bad images are listed in its `bad.jsonl`.
        rank: index of this process.
        world: number of processes.
        batch: images per call of the encoder.
        workers: threads that decode and resize.
        min_side: images smaller than a square of this side are left out; in a bucket, than one of its shape
            and in proportion. At the encoder's resolution no image is enlarged.
        buckets: sizes of which an image takes the one of the nearest ratio; None crops all to the square.
        unsafe: the filter that the dataset was opened with; it is stored in the shards.
        pairs: whether the dataset was opened for pairs; both images of a pair get the size of the preferred.
        dtype: of the stored latents.
        progress: called after each batch and each unit.

    Raises:
        HyperAlignError: `out` holds shards of another encoder, resolution or dataset; over 1 % of the
            images or units are bad, and more than one; a file cannot be written. Finished shards stay.
    """
    bad = BadImages(out)
    check_writable(bad.path, "Choose another folder for the shards.")
    units = range(rank, dataset.units(), world)
    with Threads(max(1, workers)) as threads:
        run = _EncodingRun(
            dataset, encoder, out, batch, min_side, buckets, str(unsafe or ""), pairs, dtype, threads,
            progress or (lambda _: None), len(units), bad,
        )  # fmt: skip
        missing = [unit for unit in units if not run.is_finished(unit)]
        run.counts.units = run.counts.reused = len(units) - len(missing)
        for unit in missing:
            run.encode_unit(unit)
    bad.check()
    return run.counts


def prepare(item: DatasetItem, side: int, min_side: int, buckets: Sequence[Bucket] | None = None) -> Prepared:
    """Returns an image in the size of its bucket, or None if it is too small.

    Args:
        item: of a dataset.
        side: of the square, in pixels.
        min_side: as for `encode_dataset`.
        buckets: the sizes to choose from; None takes the square.
    """
    image = item if isinstance(item, BadImage | UnsafeImage) else decode(item)
    if isinstance(image, BadImage | UnsafeImage):
        return image
    width, height = image.image.size
    bucket = nearest_bucket(height, width, buckets or [(side, side)])
    factor = enlargement(height, width, bucket)
    if image.rejected is not None:
        factor = max(factor, enlargement(image.rejected.height, image.rejected.width, bucket))
    if factor * min_side > side * (1 + 1e-9):  # rounding must not cost an image of just that size
        return None
    rejected = None if image.rejected is None else _fitted(image.rejected, bucket)
    return PreparedImage(image.caption, image.name, _fitted(image.image, bucket), factor > 1.0, rejected)


def _fitted(image: Image.Image, bucket: Bucket) -> NDArray[np.uint8]:
    return np.asarray(ImageOps.fit(image, (bucket[1], bucket[0]), Image.Resampling.LANCZOS))


@dataclass(slots=True)
class _Group:
    """The images of one bucket of a shard so far."""

    waiting: list[PreparedImage] = field(default_factory=list[PreparedImage])
    """Those of the next batch."""
    captions: list[str] = field(default_factory=list[str])
    names: list[str] = field(default_factory=list[str])
    latents: list[Tensor] = field(default_factory=list[Tensor])
    rejected: list[Tensor] = field(default_factory=list[Tensor])


@dataclass(slots=True)
class _EncodedUnit:
    """The contents of a shard so far."""

    number: int
    groups: dict[Bucket, _Group] = field(default_factory=dict[Bucket, _Group])
    bad: list[BadImage] = field(default_factory=list[BadImage])
    unsafe: int = 0
    too_small: int = 0
    enlarged: int = 0


@dataclass(slots=True)
class _EncodingRun:
    dataset: PreferenceDataset
    encoder: ImageEncoder
    out: Path
    batch: int
    min_side: int
    buckets: Sequence[Bucket] | None
    unsafe_mark: str
    pairs: bool
    dtype: torch.dtype
    threads: Threads
    progress: Callable[[Counts], None]
    total: int
    bad: BadImages
    counts: Counts = field(default_factory=Counts)

    def is_finished(self, unit: int) -> bool:
        """Returns whether a unit has its shard. Raises HyperAlignError if the shard does not fit this run."""
        path = shard_path(self.out, unit)
        if not path.exists():
            return False
        try:
            found, _ = read_shard_header(path)
        except HyperAlignError as error:
            logger.warning("encoding again: %s", error)
            return False
        least = self.min_side if found.version > 1 else found.min_side  # version 1 does not say it
        for what, is_, should in (
            ("was encoded by", found.encoder, self.encoder.fingerprint),
            ("holds images with a side of", found.resolution, self.encoder.resolution),
            ("was made from", found.unit, self.dataset.unit_name(unit)),
            ("excludes as unsafe", found.unsafe_mark or "nothing", self.unsafe_mark or "nothing"),
            ("leaves out images under", found.min_side, least),
            ("holds", _pair_words(found.pairs), _pair_words(self.pairs)),
            ("has", _shape_words(found.bucketed), _shape_words(self.buckets is not None)),
        ):
            if is_ != should:
                raise HyperAlignError(
                    f"{path} {what} {is_}, not {should}. Choose another --out, or delete it."
                )
        self.bad.count_finished(unit, found.unit, found.names, found.unsafe + found.too_small)
        return True

    def encode_unit(self, number: int) -> None:
        """Encodes a unit and writes its shard. Raises HyperAlignError."""
        unit = _EncodedUnit(number)
        try:
            for image in self._prepared(unit):
                group = unit.groups.setdefault(image.bucket, _Group())
                group.waiting.append(image)
                if len(group.waiting) == self.batch:
                    self._encode(group, unit)
            for group in unit.groups.values():
                self._encode(group, unit)
        except UnreadableUnit as error:
            logger.warning("skipped a unit: %s", error)
            self.counts.unreadable += 1
            self._list_bad(number, [BadImage(self.dataset.unit_name(number), str(error))])
            self._check_units()
            return
        self._list_bad(number, unit.bad)  # before the shard: an interruption must not lose them
        self._write(unit)
        self.counts.units += 1
        self.progress(self.counts)

    def _prepared(self, unit: _EncodedUnit) -> Iterator[PreparedImage]:
        def work(item: DatasetItem) -> Prepared:
            return prepare(item, self.encoder.resolution, self.min_side, self.buckets)

        items = self.dataset.read(unit.number)
        for _, result in self.threads.in_order(work, items, ahead=2 * self.batch):
            self.bad.seen += 1
            if result is None:
                self.counts.too_small += 1
                unit.too_small += 1
            elif isinstance(result, UnsafeImage):
                self.counts.unsafe += 1
                unit.unsafe += 1
            elif isinstance(result, BadImage):
                self._skip(result, unit)
            else:
                yield result

    def _encode(self, group: _Group, unit: _EncodedUnit) -> None:
        """Encodes the images that wait in a group."""
        images, group.waiting = group.waiting, []
        if not images:
            return
        latents = self._latents([image.pixels_HWC for image in images])
        finite_B = torch.isfinite(latents).flatten(1).all(1)
        losers = [image.rejected_HWC for image in images if image.rejected_HWC is not None]
        if losers:
            rejected = self._latents(losers)
            finite_B &= torch.isfinite(rejected).flatten(1).all(1)
            group.rejected.append(rejected[finite_B])
        group.latents.append(latents[finite_B])
        for image, finite in zip(images, finite_B.tolist(), strict=True):
            if finite:
                group.captions.append(image.caption)
                group.names.append(image.name)
                unit.enlarged += image.enlarged
                self.counts.enlarged += image.enlarged
                self.counts.images += 1
            else:
                self._skip(BadImage(image.name, "its latent is not finite"), unit)
        self.progress(self.counts)

    def _latents(self, pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
        pixels_BHWC = torch.from_numpy(np.stack(pixels))
        images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 255.0
        return self.encoder.encode(images_BCHW).to("cpu", self.dtype)

    def _skip(self, image: BadImage, unit: _EncodedUnit) -> None:
        logger.warning("skipped %s: %s", image.name, image.reason)
        unit.bad.append(image)
        self.bad.images.append(image)
        self.counts.bad += 1
        if self.bad.too_many_early():
            self._list_bad(unit.number, unit.bad)
            self.bad.check()

    def _check_units(self) -> None:
        if self.counts.unreadable > max(1, MAX_BAD_SHARE * self.total):
            raise HyperAlignError(
                f"{self.counts.unreadable} of {self.total} units cannot be read; at most 1 % may be. "
                f"{self.bad.path} lists them: download them again, then run again."
            )

    def _write(self, unit: _EncodedUnit) -> None:
        path = shard_path(self.out, unit.number)
        groups = {bucket: unit.groups[bucket] for bucket in sorted(unit.groups) if unit.groups[bucket].names}
        header = ShardHeader(
            [caption for group in groups.values() for caption in group.captions],
            [name for group in groups.values() for name in group.names],
            self.encoder.fingerprint,
            self.encoder.resolution,
            self.dataset.unit_name(unit.number),
            unit.unsafe,
            self.unsafe_mark,
            bucketed=self.buckets is not None,
            min_side=self.min_side,
            too_small=unit.too_small,
            enlarged=unit.enlarged,
            pairs=self.pairs,
        )
        latents = {bucket: torch.cat(group.latents) for bucket, group in groups.items()}
        rejected = {bucket: torch.cat(group.rejected) for bucket, group in groups.items() if self.pairs}
        with cannot_write(path, self._make_room()):
            for left_over in self.out.glob(f".{path.name}.*.partial"):
                left_over.unlink()
            write_shard(path, latents, header, rejected)

    def _list_bad(self, unit: int, images: Iterable[BadImage]) -> None:
        self.bad.append(unit, images, self._make_room())

    def _make_room(self) -> str:
        return (
            f"{free_bytes(self.out) / 2**30:.2f} GiB are free there. Make room and run the same command "
            "again: finished shards stay and are not made again."
        )


def _pair_words(pairs: bool) -> str:
    return "pairs (--pairs)" if pairs else "single images"


def _shape_words(bucketed: bool) -> str:
    return "images in buckets of several shapes" if bucketed else "images cropped to squares (--no-buckets)"
