"""Labels of what a scene or prompt states about each noun: the auxiliary task for attribute binding.

With a contrastive loss alone, training stays on a plateau where "a red heart and a blue circle" is the
sum of its words. Labels that join noun and colour, or noun and side, move both encoders off it.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperalign.tiny.geneval import Detection, relation_holds
from hyperalign.tiny.prompts import COLORS, MIRRORED, NOUNS, RELATIONS, SHAPES, Content, Relation
from train.tiny.scenes import Scene

COUNTS = 4
SIDES_START = len(NOUNS) * COUNTS
COLORS_START = SIDES_START + len(NOUNS) * len(RELATIONS)
ATTRIBUTES = COLORS_START + len(SHAPES) * len(COLORS)
"""31 nouns x 4 counts, 31 nouns x 4 sides, 3 shapes x 8 colours."""


def _side(noun: str, relation: Relation) -> int:
    return SIDES_START + NOUNS.index(noun) * len(RELATIONS) + RELATIONS.index(relation)


def _counted(looks: Counter[tuple[str, str | None]]) -> list[int]:
    labels = [NOUNS.index(noun) * COUNTS + min(count, COUNTS) - 1 for (noun, _), count in looks.items()]
    colored = [(noun, color) for noun, color in looks if color is not None]
    return labels + [COLORS_START + SHAPES.index(n) * len(COLORS) + COLORS.index(c) for n, c in colored]


def scene_labels(scene: Scene) -> list[int]:
    """Returns the attributes of a scene; sides only if it has two objects."""
    labels = _counted(Counter((item.noun, item.color) for item in scene.items))
    if len(scene.items) == 2:
        a, b = (Detection(item.noun, None, item.x, item.y, 1.0) for item in scene.items)
        for relation in RELATIONS:
            if relation_holds(a, b, relation):
                labels += [_side(a.noun, relation), _side(b.noun, MIRRORED[relation])]
    return labels


def prompt_labels(content: Content) -> list[int]:
    """Returns the attributes that a prompt names."""
    labels = _counted(Counter({(group.noun, group.color): group.count for group in content.groups}))
    if content.relation is not None:
        first, second = (group.noun for group in content.groups)
        labels += [_side(first, content.relation), _side(second, MIRRORED[content.relation])]
    return labels


def attribute_loss(logits_NK: Tensor, labels: list[list[int]], no_sides: list[bool]) -> Tensor:
    """Binary cross-entropy of K attributes per sample, divided by the number of those that hold.

    Args:
        logits_NK: one logit per attribute.
        labels: the attributes that hold, per sample.
        no_sides: samples that state nothing about sides.
    """
    target = torch.zeros_like(logits_NK)
    known = torch.ones_like(logits_NK)
    for row, (holds, unknown) in enumerate(zip(labels, no_sides, strict=True)):
        target[row, holds] = 1.0
        if unknown:
            known[row, SIDES_START:COLORS_START] = 0.0
    loss = F.binary_cross_entropy_with_logits(logits_NK, target, weight=known, reduction="sum")
    return loss / target.sum()


def image_attribute_loss(logits_NK: Tensor, scenes: list[Scene]) -> Tensor:
    """Attribute loss of the logits of images."""
    return attribute_loss(logits_NK, [scene_labels(scene) for scene in scenes], [False] * len(scenes))


def prompt_attribute_loss(logits_TK: Tensor, prompts: list[Content]) -> Tensor:
    """Attribute loss of the logits of prompts."""
    no_sides = [len(content.groups) == 2 and content.relation is None for content in prompts]
    return attribute_loss(logits_TK, [prompt_labels(content) for content in prompts], no_sides)
