"""Scores the pictures of a folder in batches, while threads decode the next ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...rewards import Reward
from .files import Log, Row, Scored, file_state
from .images import BadPicture, decode, in_order

BATCH_PIXELS = 1 << 25
"""A batch has no more pixels than 32 pictures of 1024 x 1024: in float32 they take 400 MB."""
WAITING_BATCHES = 4
"""How many batches of decoded pictures may wait for others of their size."""

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
) -> list[BadPicture]:
    """Scores what the log lacks of the pictures that have a prompt, and returns those left out.

    Args:
        folder: where the pictures lie.
        prompts: by the pictures' names, relative to the folder.
        rewards: each scores every picture.
        log: where the scores go after each batch.
        device: where the rewards' networks are.
        batch: pictures at once, at most; all of a batch have one size.
        threads: how many decode.
        progress: told how many pictures are done, each time.
    """
    todo = [name for name, prompt in prompts.items() if not is_scored(folder, name, prompt, log)]
    score = partial(_score, folder, prompts=prompts, rewards=rewards, device=device)
    return in_batches(folder, todo, score, log, batch=batch, threads=threads, progress=progress)


def in_batches(
    folder: Path,
    names: Iterable[str],
    rows_of: Callable[[Sequence[Decoded]], Sequence[Row | BadPicture]],
    log: Log[Row],
    *,
    batch: int,
    threads: int,
    progress: Callable[[int], object],
) -> list[BadPicture]:
    """Makes rows of pictures, appends them to the log after each batch, and returns the pictures left out.

    Args:
        folder: where the pictures lie.
        names: of the pictures, relative to the folder.
        rows_of: makes a row of each picture of a batch, or says why it cannot.
        log: where the rows go.
        batch: pictures at once, at most; all of a batch have one size.
        threads: how many decode.
        progress: told how many pictures are done, each time.
    """
    bad: list[BadPicture] = []

    def good(found: Iterable[tuple[str, Tensor | BadPicture]]) -> Iterator[Decoded]:
        for name, picture in found:
            if isinstance(picture, BadPicture):
                bad.append(picture)
                progress(1)
            else:
                yield name, picture

    with ThreadPoolExecutor(threads) as pool:
        decoded = in_order(pool, partial(decode, folder), names, 2 * threads)
        for pictures in batches_of_one_size(good(decoded), batch):
            rows = rows_of(pictures)
            bad += (row for row in rows if isinstance(row, BadPicture))
            log.append([row for row in rows if not isinstance(row, BadPicture)])
            progress(len(rows))
    return bad


def is_scored(folder: Path, name: str, prompt: str, log: Log[Scored]) -> bool:
    """Whether the log has a picture with this prompt and as the file is now."""
    row = log.rows.get(name)
    return row is not None and row.prompt == prompt and (row.size, row.modified) == file_state(folder / name)


def batches_of_one_size(pictures: Iterable[Decoded], batch: int) -> Iterator[list[Decoded]]:
    """Yields batches of equal height and width; few pictures wait, even if no two have one size."""
    waiting: dict[Size, list[Decoded]] = {}
    for name, picture in pictures:
        height, width = picture.shape[-2:]
        group = waiting.setdefault((height, width), [])
        group.append((name, picture))
        if len(group) >= min(batch, BATCH_PIXELS // (height * width)):
            yield waiting.pop((height, width))
        elif sum(p.numel() for w in waiting.values() for _, p in w) > WAITING_BATCHES * 3 * BATCH_PIXELS:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
        elif sum(map(len, waiting.values())) >= WAITING_BATCHES * batch:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def _score(
    folder: Path,
    pictures: Sequence[Decoded],
    prompts: Mapping[str, str],
    rewards: Sequence[Reward],
    device: torch.device,
) -> list[Scored | BadPicture]:
    names = [name for name, _ in pictures]
    texts = [prompts[name] for name in names]
    images_BCHW = torch.stack([picture for _, picture in pictures]).to(device).float() / 255
    with torch.no_grad():
        columns = {reward.name: reward.score(images_BCHW, texts).tolist() for reward in rewards}
    rows: list[Scored | BadPicture] = []
    for index, (name, text) in enumerate(zip(names, texts, strict=True)):
        scores = {reward: float(column[index]) for reward, column in columns.items()}
        if all(map(math.isfinite, scores.values())):
            rows.append(Scored(name, text, scores, *file_state(folder / name)))
        else:
            rows.append(BadPicture(name, f"its scores are no finite numbers ({scores})"))
    return rows
