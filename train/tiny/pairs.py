"""Preference pairs for the judges: right beats its near miss, Fluent beats Noto, clean beats damaged."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hyperalign.tiny.geneval import Detection, is_correct
from hyperalign.tiny.prompts import (
    COLORS,
    FAMILIES,
    NOUNS,
    SHAPES,
    TEMPLATES,
    Content,
    Family,
    Group,
    Split,
    caption,
    near_miss,
    sample_content,
    split_of,
)
from hyperalign.tiny.text_encoder import tokenize_batch
from train.tiny.art import Art
from train.tiny.augment import degrade
from train.tiny.scenes import Scene, render, sample_scene

GROUP_IMAGES = 4
"""Per group: the liked image, its worse twin, and an image of each of two near misses."""
GROUP_TEXTS = 3
"""Per group: the prompt and its two near misses."""
DAMAGED = 0.5
"""Share of worse twins that are damaged instead of drawn in the other style."""
NO_COLOR = -100
DRAWN_FAMILIES: tuple[Family, ...] = (*FAMILIES, "position", "color_attribution")
"""The two families that ask for binding are the hard ones, hence drawn twice as often."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """G groups of four images and three prompts, with the truth about every combination."""

    images_NCHW: Tensor
    tokens_TL: Tensor
    own_NT: Tensor
    """The image was drawn for this prompt."""
    wrong_NT: Tensor
    """The image does not show exactly what the prompt says."""
    scenes: list[Scene]

    def prompts(self) -> list[Content]:
        """Returns the contents of the T prompts."""
        groups = range(0, len(self.scenes), GROUP_IMAGES)
        return [self.scenes[first + k].content for first in groups for k in (0, 2, 3)]


def draw(scenes: list[Scene], art: Art) -> Tensor:
    """Returns the scenes' images (N, 3, 64, 64) in [0, 1]."""
    pixels = np.stack([render(scene, art) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0


def truth(scene: Scene) -> list[Detection]:
    """Returns what a perfect detector would find in a scene."""
    return [Detection(item.noun, item.color, float(item.x), float(item.y), 1.0) for item in scene.items]


def shows_exactly(content: Content, scene: Scene) -> bool:
    """Whether a scene holds the content and nothing else."""
    asked = Counter({(group.noun, group.color): group.count for group in content.groups})
    drawn = Counter((item.noun, item.color) for item in scene.items)
    return asked == drawn and is_correct(content, truth(scene))


def sample_wording(rng: random.Random, content: Content, split: Split | None) -> str | None:
    """Returns a caption of the content in the split (any where None), or None where it has none there."""
    allowed = [t for t in TEMPLATES if split is None or split_of(content, t) == split]
    return caption(content, rng.choice(allowed)) if allowed else None


def sample_right(rng: random.Random, split: Split | None) -> tuple[Content, str]:
    """Draws a content with a caption in the split."""
    while True:
        content = sample_content(rng, rng.choice(DRAWN_FAMILIES))
        text = sample_wording(rng, content, split)
        if text is not None:
            return content, text


def sample_miss(rng: random.Random, content: Content, split: Split | None) -> tuple[Content, str]:
    """Draws a near miss of the content with a caption in the split.

    Where a content's few near misses all lie in the other split, their near misses serve.
    """
    missed = content
    while True:
        missed = near_miss(missed, rng)
        text = sample_wording(rng, missed, split)
        if text is not None and missed != content:
            return missed, text


def sample_pairs(
    rng: random.Random, groups: int, art: Art, split: Split | None, same_layout: float
) -> PairBatch:
    """Draws a batch; a share `same_layout` of twins differs from the liked image in style alone."""
    scenes: list[Scene] = []
    texts: list[str] = []
    damaged: list[int] = []
    for group in range(groups):
        content, text = sample_right(rng, split)
        misses = [sample_miss(rng, content, split) for _ in range(GROUP_TEXTS - 1)]
        liked = sample_scene(rng, content, "fluent")
        twin = liked if rng.random() < same_layout else sample_scene(rng, content, "fluent")
        if rng.random() < DAMAGED:
            damaged.append(group * GROUP_IMAGES + 1)
        else:
            twin = replace(twin, style="noto")
        scenes += [liked, twin, *(sample_scene(rng, missed) for missed, _ in misses)]
        texts += [text, *(missed_text for _, missed_text in misses)]
    images = draw(scenes, art)
    if damaged:
        images[damaged] = degrade(images[damaged], torch.Generator().manual_seed(rng.getrandbits(31)))
    own, wrong = _relations(scenes, groups)
    return PairBatch(images, tokenize_batch(texts), own, wrong, scenes)


def _relations(scenes: list[Scene], groups: int) -> tuple[Tensor, Tensor]:
    own = torch.zeros(groups * GROUP_IMAGES, groups * GROUP_TEXTS, dtype=torch.bool)
    for group in range(groups):
        for image, text in ((0, 0), (1, 0), (2, 1), (3, 2)):
            own[group * GROUP_IMAGES + image, group * GROUP_TEXTS + text] = True
    prompts = [scenes[g * GROUP_IMAGES + k].content for g in range(groups) for k in (0, 2, 3)]
    wrong = torch.tensor([[not shows_exactly(content, scene) for content in prompts] for scene in scenes])
    return own, wrong & ~own


def sample_clutter(rng: random.Random) -> Content:
    """Draws up to four things of any kinds: what a badly aligned model draws."""
    nouns = rng.sample(NOUNS, rng.randint(1, 3))
    counts = [1 + (rng.random() < 0.3 and len(nouns) < 3) for _ in nouns]
    colors = [rng.choice(COLORS) if noun in SHAPES else None for noun in nouns]
    groups = (Group(*group) for group in zip(nouns, colors, counts, strict=True))
    return Content("two_object", tuple(groups))


def centre_targets(scenes: list[Scene], grid: int) -> tuple[Tensor, Tensor]:
    """Returns centre heat (N, 31, grid, grid), 1 at centres, and colours (N, grid, grid), -100 where none."""
    cell = 64 / grid
    heat = torch.zeros(len(scenes), len(NOUNS), grid, grid)
    colors = torch.full((len(scenes), grid, grid), NO_COLOR, dtype=torch.long)
    axis = torch.arange(grid, dtype=torch.float32)
    for n, scene in enumerate(scenes):
        for item in scene.items:
            column, row = int(item.x / cell), int(item.y / cell)
            x, y = item.x / cell - 0.5, item.y / cell - 0.5
            bump = torch.exp(-((axis[None] - x) ** 2) - (axis[:, None] - y) ** 2)
            bump[row, column] = 1.0
            k = NOUNS.index(item.noun)
            heat[n, k] = torch.maximum(heat[n, k], bump)
            if item.color is not None:
                around = (slice(max(0, row - 1), row + 2), slice(max(0, column - 1), column + 2))
                colors[n][around] = COLORS.index(item.color)
    return heat, colors
