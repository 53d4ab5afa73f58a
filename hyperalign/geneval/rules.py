"""GenEval's rules, as functions of the detections in an image.

Thresholds and rules are those of the official evaluate_images.py (djghosh13/geneval), which does not suppress
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
"""The least distance of the centres, as a fraction of the two objects' sizes."""
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
    """One of `prompts.COLORS`, where a prompt requires one."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Whether an image is correct for its prompt, and what is wrong if not."""

    correct: bool
    reasons: tuple[str, ...]


AnyDetection = TypeVar("AnyDetection", bound=Detection)


def threshold(tag: str) -> float:
    """Returns the score that a detection must exceed; it is higher for counting."""
    return COUNTING_THRESHOLD if tag == "counting" else THRESHOLD


def select(detections: Iterable[AnyDetection], tag: str) -> dict[str, list[AnyDetection]]:
    """Returns the detections that count for a task, by class, the highest scores first."""
    objects: dict[str, list[AnyDetection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > threshold(tag):
            objects.setdefault(detection.name, []).append(detection)
    return {name: group[:MAX_OBJECTS] for name, group in objects.items()}


def evaluate(prompt: Prompt, objects: Mapping[str, Sequence[Detection]]) -> Evaluation:
    """Evaluates an image by its selected detections, with colours where the prompt requires them.

    Colour and position are those of the `count` objects of a class with the highest scores. A position is
    correct if it is correct between all of them.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for required in prompt.include:
        group = objects.get(required.name, ())[: required.count]
        reason = _failure(required, group, groups)
        groups.append(None if reason else group)
        reasons += [reason] if reason else []
    for excluded in prompt.exclude:
        if (count := len(objects.get(excluded.name, ()))) >= excluded.count:
            reasons.append(f"expected {excluded.name}<{excluded.count}, found {count}")
    return Evaluation(not reasons, tuple(reasons))


def _failure(
    required: Requirement, group: Sequence[Detection], earlier: Sequence[Sequence[Detection] | None]
) -> str | None:
    """Returns what is wrong with the objects of one requirement; `earlier` are those of correct ones."""
    if len(group) < required.count:
        return f"expected {required.name}>={required.count}, found {len(group)}"
    if required.color is not None:
        colors = [detection.color for detection in group]
        if (count := colors.count(required.color)) < required.count:
            others = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            wanted = f"{required.color} {required.name}>={required.count}"
            return f"expected {wanted}, found {count} {required.color}; and {others}"
    if required.relation is None:
        return None
    targets = earlier[required.target]
    if targets is None:
        return f"no target for {required.name} to be {required.relation}"
    for detection in group:
        for target in targets:
            if required.relation not in (true := relations(detection.box, target.box)):
                return (
                    f"expected {required.name} {required.relation} target, found {' and '.join(true)} target"
                )
    return None


def relations(box: Box, target: Box) -> tuple[Relation, ...]:
    """Returns the sides of a target on which a box is: none, one or two.

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
