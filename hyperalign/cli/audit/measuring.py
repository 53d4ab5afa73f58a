"""Scores each image of a folder under several prompts and alterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...files import file_state
from ...image_files import BadImage
from ...rewards import Reward
from ..common.batches import Decoded, score_in_batches
from ..common.log import Log
from .pixels import ALTERATIONS, properties

OWN = "its own prompt"
"""The case of an image under its own prompt; other cases are prompts, or alterations of the image."""

Scores = dict[str, float]
"""By case."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The scores and pixel properties of an image."""

    name: str
    """Relative to the folder."""
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
    """The prompts and alterations that every image is scored with."""

    own: Mapping[str, str]
    """The images' own prompts by name; empty without --prompts."""
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
    """Measures the images that the log lacks, appends them to it, and returns the skipped images.

    The arguments are those of `score_in_batches`.
    """
    todo = [name for name in names if not is_measured(folder, name, cases, log)]
    score = partial(_measure_batch, folder, cases=cases, rewards=rewards, device=device)
    return score_in_batches(folder, todo, score, log, batch=batch, threads=threads, progress=progress)


def is_measured(folder: Path, name: str, cases: Cases, log: Log[Measured]) -> bool:
    """Returns whether the log has the scores of the current file under this prompt."""
    row = log.current(folder, name)
    return row is not None and row.prompt == cases.own.get(name, "")


def _measure_batch(
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
            rows.append(BadImage(name, f"its scores are not finite ({scores})"))
            continue
        pixels = properties(images_BCHW[index].cpu())
        rows.append(Measured(name, cases.own.get(name, ""), pixels, scores, *file_state(folder / name)))
    return rows
