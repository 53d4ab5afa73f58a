"""Scores each image of a folder under several prompts and alterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...rewards import Reward
from ..score.files import Log, file_state
from ..score.images import BadImage
from ..score.scoring import Decoded, in_batches
from .pixels import ALTERATIONS, properties

OWN = "its own prompt"
"""The case of an image under its own prompt; other cases are prompts, or alterations of the image."""

Scores = dict[str, float]
"""By case."""


@dataclass(frozen=True, slots=True)
class Measured:
    """All that was found out about an image."""

    name: str
    prompt: str
    """Its own, empty without one."""
    pixels: dict[str, float]
    scores: dict[str, Scores]
    """By reward."""
    size: int
    modified: int
    """With `size` the image's `file_state`."""


@dataclass(frozen=True, slots=True)
class Cases:
    """What every image is scored under."""

    own: Mapping[str, str]
    """Prompts by the images' names; empty where only `texts` are asked for."""
    texts: Sequence[str]
    """Prompts for all images."""
    altered: bool
    """Whether each image is also scored altered, under its own prompt or else the first text."""

    def of(self, names: Sequence[str], images_BCHW: Tensor) -> Iterator[tuple[str, Tensor, list[str]]]:
        """Yields cases with images and prompts."""
        own = [self.own[name] for name in names] if self.own else [self.texts[0]] * len(names)
        if self.own:
            yield OWN, images_BCHW, own
        for text in self.texts:
            yield text, images_BCHW, [text] * len(names)
        if self.altered:
            for name, alter in ALTERATIONS.items():
                yield name, torch.stack([alter(image) for image in images_BCHW]), own


def measure(
    folder: Path,
    names: Sequence[str],
    cases: Cases,
    rewards: Sequence[Reward],
    log: Log[Measured],
    *,
    device: torch.device,
    batch: int,
    threads: int,
    progress: Callable[[int], object],
) -> list[BadImage]:
    """Measures what the log lacks, appends to it after each batch, and returns the images left out."""
    todo = [name for name in names if not is_measured(folder, name, cases, log)]
    rows_of = partial(_measure, folder, cases=cases, rewards=rewards, device=device)
    return in_batches(folder, todo, rows_of, log, batch=batch, threads=threads, progress=progress)


def is_measured(folder: Path, name: str, cases: Cases, log: Log[Measured]) -> bool:
    """Whether the log has an image with this prompt and as the file is now."""
    row = log.rows.get(name)
    if row is None or row.prompt != cases.own.get(name, ""):
        return False
    return (row.size, row.modified) == file_state(folder / name)


def _measure(
    folder: Path, images: Sequence[Decoded], cases: Cases, rewards: Sequence[Reward], device: torch.device
) -> list[Measured | BadImage]:
    names = [name for name, _ in images]
    images_BCHW = torch.stack([image for _, image in images]).to(device).float() / 255
    columns: dict[str, dict[str, list[float]]] = {reward.name: {} for reward in rewards}
    with torch.no_grad():
        for case, altered_BCHW, prompts in cases.of(names, images_BCHW):
            for reward in rewards:
                columns[reward.name][case] = reward.score(altered_BCHW, prompts).tolist()
    rows: list[Measured | BadImage] = []
    for index, name in enumerate(names):
        scores = {
            reward: {case: float(column[index]) for case, column in found.items()}
            for reward, found in columns.items()
        }
        if not all(math.isfinite(score) for found in scores.values() for score in found.values()):
            rows.append(BadImage(name, f"its scores are no finite numbers ({scores})"))
            continue
        pixels = properties(images_BCHW[index].cpu())
        rows.append(Measured(name, cases.own.get(name, ""), pixels, scores, *file_state(folder / name)))
    return rows
