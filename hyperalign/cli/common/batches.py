"""Scores images in batches, while threads decode the next ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ...image_files import BadImage, decode
from ...threads import Threads
from .log import Log, Row

BATCH_PIXELS = 1 << 25
"""A batch has no more pixels than 32 images of 1024 x 1024: in float32 they take 400 MB."""
WAITING_BATCHES = 4
"""How many batches of decoded images may wait for others of their size."""

Size = tuple[int, int]
Decoded = tuple[str, Tensor]
"""An image's name and its bytes (3, H, W)."""


def score_in_batches(
    folder: Path,
    names: Iterable[str],
    score: Callable[[Sequence[Decoded]], Sequence[Row | BadImage]],
    log: Log[Row],
    *,
    batch: int,
    threads: int,
    progress: Callable[[int], object],
) -> list[BadImage]:
    """Scores images, appends the rows to the log after each batch, and returns the skipped images.

    Args:
        folder: of the images.
        names: of the images, relative to the folder.
        score: returns a row for each image of a batch, or why the image is skipped.
        log: receives the rows.
        batch: maximal batch size; all images of a batch have one size.
        threads: how many decode.
        progress: receives the number of images finished since its last call.
    """
    bad: list[BadImage] = []

    def good(found: Iterable[tuple[str, Tensor | BadImage]]) -> Iterator[Decoded]:
        for name, image in found:
            if isinstance(image, BadImage):
                bad.append(image)
                progress(1)
            else:
                yield name, image

    with Threads(threads) as decoders:
        decoded = decoders.in_order(partial(decode, folder), names, ahead=2 * threads)
        for images in batches_of_one_size(good(decoded), batch):
            rows = score(images)
            bad += (row for row in rows if isinstance(row, BadImage))
            log.append([row for row in rows if not isinstance(row, BadImage)])
            progress(len(rows))
    return bad


def batches_of_one_size(images: Iterable[Decoded], batch: int) -> Iterator[list[Decoded]]:
    """Yields batches of equal height and width; few images wait, even if no two have one size."""
    waiting: dict[Size, list[Decoded]] = {}
    for name, image in images:
        height, width = image.shape[-2:]
        group = waiting.setdefault((height, width), [])
        group.append((name, image))
        if len(group) >= min(batch, BATCH_PIXELS // (height * width)):
            yield waiting.pop((height, width))
        elif sum(p.numel() for w in waiting.values() for _, p in w) > WAITING_BATCHES * 3 * BATCH_PIXELS:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
        elif sum(map(len, waiting.values())) >= WAITING_BATCHES * batch:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()
