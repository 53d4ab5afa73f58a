"""Scores the images of a folder under their prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...files import file_state
from ...image_files import BadImage
from ...rewards import Reward
from ..common.batches import Decoded, score_in_batches
from ..common.log import Log


@dataclass(frozen=True, slots=True)
class Scored:
    """An image's scores, and what they were computed from."""

    name: str
    """Relative to the folder."""
    prompt: str
    scores: dict[str, float]
    """By the rewards' names."""
    size: int
    modified: int
    """With `size` the image's `file_state`."""


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
    """Scores the images that the log lacks, appends them to it, and returns the skipped images.

    Args:
        folder: of the images.
        prompts: by the images' names, relative to the folder.
        rewards: each scores every image.
        log: receives the scores after each batch.
        device: of the rewards' networks.
        batch: maximal batch size; all images of a batch have one size.
        threads: how many decode.
        progress: receives the number of images finished since its last call.
    """
    todo = [name for name, prompt in prompts.items() if not is_scored(folder, name, prompt, log)]
    score = partial(_score_batch, folder, prompts=prompts, rewards=rewards, device=device)
    return score_in_batches(folder, todo, score, log, batch=batch, threads=threads, progress=progress)


def is_scored(folder: Path, name: str, prompt: str, log: Log[Scored]) -> bool:
    """Returns whether the log has the scores of the current file under this prompt."""
    row = log.current(folder, name)
    return row is not None and row.prompt == prompt


def _score_batch(
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
            rows.append(BadImage(name, f"its scores are not finite ({scores})"))
    return rows
