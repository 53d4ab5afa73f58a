"""GenEval's six families, scored by rules from the detections of an image.

Rules as in GenEval (Ghosh et al. 2023, arXiv 2310.11513): an image is correct if it shows everything
that the prompt names. Extra objects are allowed, except in `counting`, which needs exactly that many
objects and no other (GenEval only counts the class itself; in scenes this small a stray object is a
wrong count).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import HyperAlignError
from .prompts import FAMILIES, Content, Family, Group, Relation

POSITION_MARGIN = 6.0
"""Minimum distance of two centres along the axis of the relation, in pixels."""
POSITION_ALIGNMENT = 0.5
"""Minimum share of the distance of two centres along that axis (GenEval's threshold: 60 degrees)."""


@dataclass(frozen=True, slots=True)
class Detection:
    """A detected object; centre in pixels from the top left, `color` only for shapes."""

    noun: str
    color: str | None
    x: float
    y: float
    score: float


def matching(group: Group, detections: Sequence[Detection]) -> list[Detection]:
    """Returns the detections of a group's noun and colour by descending score."""
    found = [d for d in detections if d.noun == group.noun and d.color == group.color]
    return sorted(found, key=lambda d: -d.score)


def relation_holds(first: Detection, second: Detection, relation: Relation) -> bool:
    """Returns whether the centre of `first` is on the named side of that of `second`."""
    dx, dy = first.x - second.x, first.y - second.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return along >= POSITION_MARGIN and along >= POSITION_ALIGNMENT * math.hypot(dx, dy)


def is_correct(content: Content, detections: Sequence[Detection]) -> bool:
    """Returns whether an image with these detections shows the content, by the rules above."""
    found = [matching(group, detections) for group in content.groups]
    if content.family == "counting":
        return len(found[0]) == len(detections) == content.groups[0].count
    if not all(found):
        return False
    if content.relation is None:
        return True
    return relation_holds(found[0][0], found[1][0], content.relation)


def summarise(results: Iterable[tuple[Family, bool]]) -> dict[str, float]:
    """Returns the share of correct images per family and, as "overall", the mean of those shares.

    Families without an image are excluded from both.

    Raises:
        HyperAlignError: there is no result at all.
    """
    by_family: dict[Family, list[bool]] = {family: [] for family in FAMILIES}
    for family, correct in results:
        by_family[family].append(correct)
    shares = {str(family): sum(marks) / len(marks) for family, marks in by_family.items() if marks}
    if not shares:
        raise HyperAlignError("There is nothing to summarise: no image was scored; score at least one image.")
    return {"overall": sum(shares.values()) / len(shares), **shares}


def diversity(embeddings_PSD: Tensor) -> Tensor:
    """Returns (P,): per prompt, the mean of 1 - cosine over all pairs of its S seeds.

    Raises:
        HyperAlignError: not three dimensions, or fewer than two seeds.
    """
    if embeddings_PSD.dim() != 3 or embeddings_PSD.shape[1] < 2:
        raise HyperAlignError(
            f"Diversity received embeddings of shape {tuple(embeddings_PSD.shape)}; expected "
            "(prompts, seeds, width) with at least two seeds. Generate every prompt with two seeds or more."
        )
    unit_PSD = F.normalize(embeddings_PSD.float(), dim=-1)
    cosines_PSS = unit_PSD @ unit_PSD.transpose(1, 2)
    seeds = embeddings_PSD.shape[1]
    first, second = torch.triu_indices(seeds, seeds, offset=1)
    return (1.0 - cosines_PSS[:, first, second]).mean(dim=1)
