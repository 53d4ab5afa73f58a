"""GenEval's rules, as functions of what was detected in an image.

Thresholds and rules are those of the official evaluate_images.py (djghosh13/geneval), which suppresses no
overlapping detections.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..tiny.geneval import POSITION_ALIGNMENT
from ..tiny.prompts import Relation
from .prompts import COLORS, Prompt, Requirement

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
"""Of one class in an image."""
POSITION_SLACK = 0.1
"""Share of the two objects' sizes by which centres must differ at least."""
NOT_MOVED = 1e-3
"""Pixels."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels from the top left."""


@dataclass(frozen=True, slots=True)
class Detection:
    """An object found in an image."""

    name: str
    """One of `prompts.NAMES`."""
    score: float
    box: Box
    color: str | None = None
    """One of `prompts.COLORS`, where a prompt asks for it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an image shows its prompt, and what is wrong if not."""

    correct: bool
    reasons: tuple[str, ...]


Found = TypeVar("Found", bound=Detection)


def threshold(tag: str) -> float:
    """Returns the score a detection must exceed; counting asks for more certainty."""
    return COUNTING_THRESHOLD if tag == "counting" else THRESHOLD


def kept(detections: Iterable[Found], tag: str) -> dict[str, list[Found]]:
    """Returns the detections that count for a task, by class, the most certain first."""
    objects: dict[str, list[Found]] = {}
    for found in sorted(detections, key=lambda found: -found.score):
        if found.score > threshold(tag):
            objects.setdefault(found.name, []).append(found)
    return {name: group[:MAX_OBJECTS] for name, group in objects.items()}


def judge(prompt: Prompt, objects: Mapping[str, Sequence[Detection]]) -> Verdict:
    """Judges an image by its kept detections, with colours where the prompt asks for them.

    Only the most certain `count` objects of a class are looked at for colour and position. A position
    holds if it holds between all of them.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for asked in prompt.include:
        group = objects.get(asked.name, ())[: asked.count]
        wrong = _complaint(asked, group, groups)
        groups.append(None if wrong else group)
        reasons += [wrong] if wrong else []
    for asked in prompt.exclude:
        if (count := len(objects.get(asked.name, ()))) >= asked.count:
            reasons.append(f"expected {asked.name}<{asked.count}, found {count}")
    return Verdict(not reasons, tuple(reasons))


def _complaint(
    asked: Requirement, group: Sequence[Detection], earlier: Sequence[Sequence[Detection] | None]
) -> str | None:
    """Returns what is wrong with the objects of one requirement; `earlier` are those that were right."""
    if len(group) < asked.count:
        return f"expected {asked.name}>={asked.count}, found {len(group)}"
    if asked.color is not None:
        colors = [found.color for found in group]
        if (count := colors.count(asked.color)) < asked.count:
            others = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            wanted = f"{asked.color} {asked.name}>={asked.count}"
            return f"expected {wanted}, found {count} {asked.color}; and {others}"
    if asked.relation is None:
        return None
    targets = earlier[asked.target]
    if targets is None:
        return f"no target for {asked.name} to be {asked.relation}"
    for found in group:
        for target in targets:
            if asked.relation not in (true := relations(found.box, target.box)):
                return f"expected {asked.name} {asked.relation} target, found {' and '.join(true)} target"
    return None


def relations(box: Box, target: Box) -> tuple[Relation, ...]:
    """Returns on which sides of a target a box lies: none, one or two.

    The offset of the centres, less a tenth of the two sizes on each axis, must be more than half of the
    centres' distance along an axis.
    """
    (dx, wide), (dy, high) = (_offset(box, target, axis) for axis in (0, 1))
    dx, dy = _shrunk(dx, POSITION_SLACK * wide), _shrunk(dy, POSITION_SLACK * high)
    if max(abs(dx), abs(dy)) < NOT_MOVED:
        return ()
    distance = math.hypot(_offset(box, target, 0)[0], _offset(box, target, 1)[0])
    along: dict[Relation, float] = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return tuple(name for name, length in along.items() if length / distance > POSITION_ALIGNMENT)


def _offset(box: Box, target: Box, axis: int) -> tuple[float, float]:
    """Returns the distance of the centres and the sum of the sizes along an axis."""
    distance = (box[axis] + box[axis + 2] - target[axis] - target[axis + 2]) / 2
    return distance, abs(box[axis + 2] - box[axis]) + abs(target[axis + 2] - target[axis])


def _shrunk(length: float, by: float) -> float:
    return math.copysign(max(abs(length) - by, 0.0), length)
