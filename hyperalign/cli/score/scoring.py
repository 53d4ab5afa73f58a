"""Scores the images of a folder in batches, while threads decode the next ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...rewards import Reward
from ...threads import in_order
from .files import Log, Row, Scored, file_state
from .images import BadImage, decode

BATCH_PIXELS = 1 << 25
"""A batch has no more pixels than 32 images of 1024 x 1024: in float32 they take 400 MB."""
WAITING_BATCHES = 4
"""How many batches of decoded images may wait for others of their size."""

Size = tuple[int, int]
Decoded = tuple[str, Tensor]


def score_folder(
    folder: Path,
    prompts: Mapping[str, str],
    rewards: Sequence[Reward],
    log: Log[Scored],
    *,
    device: torch.device,
    batch: int,
    threads: int,
    progress: Callable[[int], object],
) -> list[BadImage]:
    """Scores what the log lacks of the images that have a prompt, and returns those left out.

    Args:
        folder: where the images lie.
        prompts: by the images' names, relative to the folder.
        rewards: each scores every image.
        log: where the scores go after each batch.
        device: where the rewards' networks are.
        batch: images at once, at most; all of a batch have one size.
        threads: how many decode.
        progress: told how many images are done, each time.
    """
    todo = [name for name, prompt in prompts.items() if not is_scored(folder, name, prompt, log)]
    score = partial(_score, folder, prompts=prompts, rewards=rewards, device=device)
    return in_batches(folder, todo, score, log, batch=batch, threads=threads, progress=progress)


def in_batches(
    folder: Path,
    names: Iterable[str],
    rows_of: Callable[[Sequence[Decoded]], Sequence[Row | BadImage]],
    log: Log[Row],
    *,
    batch: int,
    threads: int,
    progress: Callable[[int], object],
) -> list[BadImage]:
    """Makes rows of images, appends them to the log after each batch, and returns the images left out.

    Args:
        folder: where the images lie.
        names: of the images, relative to the folder.
        rows_of: makes a row of each image of a batch, or says why it cannot.
        log: where the rows go.
        batch: images at once, at most; all of a batch have one size.
        threads: how many decode.
        progress: told how many images are done, each time.
    """
    bad: list[BadImage] = []

    def good(found: Iterable[tuple[str, Tensor | BadImage]]) -> Iterator[Decoded]:
        for name, image in found:
            if isinstance(image, BadImage):
                bad.append(image)
                progress(1)
            else:
                yield name, image

    with ThreadPoolExecutor(threads) as pool:
        decoded = in_order(pool, partial(decode, folder), names, 2 * threads)
        for images in batches_of_one_size(good(decoded), batch):
            rows = rows_of(images)
            bad += (row for row in rows if isinstance(row, BadImage))
            log.append([row for row in rows if not isinstance(row, BadImage)])
            progress(len(rows))
    return bad


def is_scored(folder: Path, name: str, prompt: str, log: Log[Scored]) -> bool:
    """Whether the log has an image with this prompt and as the file is now."""
    row = log.rows.get(name)
    return row is not None and row.prompt == prompt and (row.size, row.modified) == file_state(folder / name)


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


def _score(
    folder: Path,
    images: Sequence[Decoded],
    prompts: Mapping[str, str],
    rewards: Sequence[Reward],
    device: torch.device,
) -> list[Scored | BadImage]:
    names = [name for name, _ in images]
    texts = [prompts[name] for name in names]
    images_BCHW = torch.stack([image for _, image in images]).to(device).float() / 255
    with torch.no_grad():
        columns = {reward.name: reward.score(images_BCHW, texts).tolist() for reward in rewards}
    rows: list[Scored | BadImage] = []
    for index, (name, text) in enumerate(zip(names, texts, strict=True)):
        scores = {reward: float(column[index]) for reward, column in columns.items()}
        if all(map(math.isfinite, scores.values())):
            rows.append(Scored(name, text, scores, *file_state(folder / name)))
        else:
            rows.append(BadImage(name, f"its scores are no finite numbers ({scores})"))
    return rows
