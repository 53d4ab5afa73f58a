"""Encodes preference images to latent shards, one a unit of the source; what is there is not made again."""

from __future__ import annotations

import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from train.data.preference.image import BadImage, BrokenUnit, Found, Source, Unsafe, UnsafeMark, decode
from train.data.shards import BAD_SHARE, ENOUGH, ShardHeader, read_shard_header, shard_path, write_shard

logger = logging.getLogger("hyperalign.train")

BAD_FILE = "bad.jsonl"

In = TypeVar("In")
Out = TypeVar("Out")


class ImageEncoder(Protocol):
    """A base model's autoencoder."""

    @property
    def resolution(self) -> int:
        """Side of the square images that it takes, in pixels."""
        ...

    @property
    def fingerprint(self) -> str:
        """Tells autoencoders and scalings of latents apart."""
        ...

    def encode(self, images_BCHW: Tensor, /) -> Tensor:
        """Returns scaled latents (B, C, h, w) of float32 images in [0, 1] on the CPU."""
        ...


@dataclass(slots=True)
class Counts:
    """What one process has done."""

    units: int = 0
    """Units that are finished, also those that were before."""
    reused: int = 0
    """Units whose shard lay there already."""
    broken: int = 0
    """Units that could not be read to their end; they have no shard."""
    images: int = 0
    """Images encoded now."""
    bad: int = 0
    """Images left out because they cannot be used; bad.jsonl names them."""
    small: int = 0
    """Images left out because their short side is under `min_side`."""
    unsafe: int = 0
    """Images left out because the data set marks them as unsafe."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image ready for the encoder: square, RGB, (H, W, 3) bytes."""

    caption: str
    name: str
    pixels_HWC: NDArray[np.uint8]


def encode(
    source: Source,
    encoder: ImageEncoder,
    out: Path,
    *,
    rank: int = 0,
    world: int = 1,
    batch: int = 16,
    workers: int = 8,
    min_side: int = 0,
    unsafe: UnsafeMark | None = None,
    dtype: torch.dtype = torch.float16,
    progress: Callable[[Counts], None] | None = None,
) -> Counts:
    """Writes the shards of units rank, rank + world, ... that are not there yet.

    A shard depends on its unit alone, so an interrupted run goes on where it stopped, on any number of
    processes. Images are resized by their short side and cropped in the middle.

    Args:
        source: where the images come from.
        encoder: what makes latents of them.
        out: folder of the shards; bad images are named in its `bad.jsonl`.
        rank: this process.
        world: number of processes.
        batch: images in a call of the encoder.
        workers: threads that decode and resize.
        min_side: images with a shorter side under this are left out.
        unsafe: the mark that the source leaves images out by; the shards remember it.
        dtype: of the stored latents.
        progress: called after each batch and each unit.

    Raises:
        HyperAlignError: `out` holds shards of another encoder, resolution or source; over 1 % of the
            images or units are bad, and more than one; a file cannot be written. Finished shards stay.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HyperAlignError(f"{out} cannot be made: {error.strerror}. Choose another folder.") from error
    units = range(rank, source.units(), world)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        run = _Run(
            source, encoder, out, batch, min_side, str(unsafe or ""), dtype, pool,
            progress or (lambda _: None), len(units),
        )  # fmt: skip
        missing = [unit for unit in units if not run.is_finished(unit)]
        run.counts.units = run.counts.reused = len(units) - len(missing)
        for unit in missing:
            run.make(unit)
    run.check_images()
    return run.counts


def prepare(found: Found, side: int, min_side: int) -> Prepared | BadImage | Unsafe | None:
    """Returns an image as a square of `side` pixels, or None if it is too small."""
    image = found if isinstance(found, BadImage | Unsafe) else decode(found)
    if isinstance(image, BadImage | Unsafe):
        return image
    if min(image.image.size) < min_side:
        return None
    square = ImageOps.fit(image.image, (side, side), Image.Resampling.LANCZOS)
    return Prepared(image.caption, image.name, np.asarray(square))


@dataclass(slots=True)
class _Unit:
    """A shard in the making."""

    number: int
    captions: list[str] = field(default_factory=list[str])
    names: list[str] = field(default_factory=list[str])
    latents: list[Tensor] = field(default_factory=list[Tensor])
    bad: list[BadImage] = field(default_factory=list[BadImage])
    unsafe: int = 0


@dataclass(slots=True)
class _Run:
    source: Source
    encoder: ImageEncoder
    out: Path
    batch: int
    min_side: int
    unsafe_mark: str
    dtype: torch.dtype
    pool: ThreadPoolExecutor
    progress: Callable[[Counts], None]
    total: int
    counts: Counts = field(default_factory=Counts)
    named: dict[int, dict[str, BadImage]] = field(init=False)
    """By unit, the images that earlier runs called bad."""
    seen: int = 0
    """Images looked at, of which a share may be bad; those of finished units were looked at before."""
    bad: list[BadImage] = field(default_factory=list[BadImage])
    """Those of them that are."""

    def __post_init__(self) -> None:
        self.named = _named(self.out / BAD_FILE)

    def is_finished(self, unit: int) -> bool:
        """Says whether a unit has its shard. Raises HyperAlignError if the shard is of something else."""
        path = shard_path(self.out, unit)
        if not path.exists():
            return False
        try:
            found, _ = read_shard_header(path)
        except HyperAlignError as error:
            logger.warning("made again: %s", error)
            return False
        for what, is_, should in (
            ("was encoded by", found.encoder, self.encoder.fingerprint),
            ("holds images with a side of", found.resolution, self.encoder.resolution),
            ("was made from", found.unit, self.source.unit_name(unit)),
            ("left out as unsafe", found.unsafe_mark or "nothing", self.unsafe_mark or "nothing"),
        ):
            if is_ != should:
                raise HyperAlignError(
                    f"{path} {what} {is_}, not {should}. Choose another --out, or delete it."
                )
        # An image that was repaired is in the shard; a unit was named when it could not be read as a whole.
        good = {*found.names, found.unit}
        bad = [image for name, image in self.named.get(unit, {}).items() if name not in good]
        self.bad += bad
        self.seen += len(found.names) + found.unsafe + len(bad)
        return True

    def make(self, unit: int) -> None:
        """Encodes a unit and writes its shard. Raises HyperAlignError."""
        made = _Unit(unit)
        try:
            for images in _chunks(self._prepared(made), self.batch):
                self._encode(images, made)
                self.progress(self.counts)
        except BrokenUnit as error:
            logger.warning("skipped a unit: %s", error)
            self.counts.broken += 1
            self._name_bad(unit, [BadImage(self.source.unit_name(unit), str(error))])
            self._check_units()
            return
        self._name_bad(unit, made.bad)  # first: whatever ends the run between, no shard hides its bad ones
        self._write(made)
        self.counts.units += 1
        self.progress(self.counts)

    def _prepared(self, made: _Unit) -> Iterator[Prepared]:
        def work(found: Found) -> Prepared | BadImage | Unsafe | None:
            return prepare(found, self.encoder.resolution, self.min_side)

        for result in _in_order(self.pool, work, self.source.read(made.number), ahead=2 * self.batch):
            self.seen += 1
            if result is None:
                self.counts.small += 1
            elif isinstance(result, Unsafe):
                self.counts.unsafe += 1
                made.unsafe += 1
            elif isinstance(result, BadImage):
                self._skip(result, made)
            else:
                yield result

    def _encode(self, images: list[Prepared], made: _Unit) -> None:
        pixels_BHWC = torch.from_numpy(np.stack([image.pixels_HWC for image in images]))
        images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 255.0
        latents = self.encoder.encode(images_BCHW).to("cpu", self.dtype)
        finite = torch.isfinite(latents).flatten(1).all(1)
        made.latents.append(latents[finite])
        for image, whole in zip(images, finite.tolist(), strict=True):
            if whole:
                made.captions.append(image.caption)
                made.names.append(image.name)
                self.counts.images += 1
            else:
                self._skip(BadImage(image.name, "its latent is not finite"), made)

    def _skip(self, image: BadImage, made: _Unit) -> None:
        logger.warning("skipped %s: %s", image.name, image.reason)
        made.bad.append(image)
        self.bad.append(image)
        self.counts.bad += 1
        if self.seen >= ENOUGH and self._too_many_bad():
            self._name_bad(made.number, made.bad)
            self.check_images()

    def _too_many_bad(self) -> bool:
        return len(self.bad) > max(1, BAD_SHARE * self.seen)

    def check_images(self) -> None:
        """Raises HyperAlignError if too many images were bad, now or in the runs that this one goes on."""
        if self._too_many_bad():
            last = self.bad[-1]
            raise HyperAlignError(
                f"{len(self.bad)} of {self.seen} images are bad; at most 1 % may be. The last is "
                f"{last.name}: {last.reason}. {self.out / BAD_FILE} names them and their units: repair or "
                "remove them, delete that file and the shards of these units, then run again."
            )

    def _check_units(self) -> None:
        if self.counts.broken > max(1, BAD_SHARE * self.total):
            raise HyperAlignError(
                f"{self.counts.broken} of {self.total} units cannot be read; at most 1 % may be. "
                f"{self.out / BAD_FILE} names them: fetch them again, then run again."
            )

    def _write(self, made: _Unit) -> None:
        path = shard_path(self.out, made.number)
        latents = torch.cat(made.latents) if made.latents else torch.empty(0, 0, 0, 0, dtype=self.dtype)
        header = ShardHeader(
            made.captions,
            made.names,
            self.encoder.fingerprint,
            self.encoder.resolution,
            self.source.unit_name(made.number),
            made.unsafe,
            self.unsafe_mark,
        )
        try:
            for left_over in self.out.glob(f".{path.name}.*.partial"):
                left_over.unlink()
            write_shard(path, latents, header)
        except (SafetensorError, OSError) as error:
            raise self._unwritable(path, error) from error

    def _name_bad(self, unit: int, bad: Iterable[BadImage]) -> None:
        lines = "".join(json.dumps({"unit": unit} | asdict(image)) + "\n" for image in bad)
        if not lines:
            return
        try:
            with (self.out / BAD_FILE).open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise self._unwritable(self.out / BAD_FILE, error) from error

    def _unwritable(self, path: Path, error: BaseException) -> HyperAlignError:
        free = shutil.disk_usage(self.out).free / 2**30
        return HyperAlignError(
            f"{path} cannot be written ({first_line(error)}); {free:.2f} GiB are free there. Make room and "
            "run the same command again: finished shards stay and are not made again."
        )


def _named(path: Path) -> dict[int, dict[str, BadImage]]:
    """Returns the bad images that earlier runs named, by unit and name."""
    found: dict[int, dict[str, BadImage]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
            image = BadImage(row["name"], row["reason"])
            found.setdefault(row["unit"], {})[image.name] = image
        except (ValueError, KeyError, TypeError) as error:  # half a line of a process that was killed
            logger.warning("%s has a line that is left aside: %s", path, first_line(error))
    return found


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[In], Out], items: Iterable[In], ahead: int
) -> Iterator[Out]:
    """Yields the results in the order of the items, with at most `ahead` of them under way."""
    waiting: deque[Future[Out]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _chunks(items: Iterable[In], size: int) -> Iterator[list[In]]:
    chunk: list[In] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
