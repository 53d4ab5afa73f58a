"""Preference pairs for the reward models: right over near miss, Fluent over Noto, clean over degraded."""

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
    meant,
    near_miss,
    sample_content,
    split_of,
)
from hyperalign.tiny.text_encoder import tokenize_batch
from train.tiny.art import Art
from train.tiny.augment import degrade
from train.tiny.scenes import Scene, render, sample_scene

GROUP_IMAGES = 4
"""Per group: the preferred image, the rejected image, and an image of each of two near misses."""
GROUP_TEXTS = 3
"""Per group: the prompt and its two near misses."""
DEGRADED = 0.5
"""Share of rejected images that are degraded instead of rendered in the other style."""
REWORDED = 0.5
"""Share of near misses of coloured prompts that try another wording before they change a fact."""
NO_COLOR = -100
SAMPLED_FAMILIES: tuple[Family, ...] = (*FAMILIES, "position", "color_attribution")
"""The two families that need attribute binding are the hardest, so they are sampled twice as often."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """G groups of four images and three prompts, with the relation of every image to every prompt."""

    images_NCHW: Tensor
    tokens_TL: Tensor
    positive_NT: Tensor
    """The image was rendered for this prompt."""
    negative_NT: Tensor
    """The image does not show exactly what the prompt names."""
    scenes: list[Scene]

    def prompts(self) -> list[Content]:
        """Returns the contents of the T prompts."""
        groups = range(0, len(self.scenes), GROUP_IMAGES)
        return [self.scenes[first + k].content for first in groups for k in (0, 2, 3)]


def render_all(scenes: list[Scene], art: Art) -> Tensor:
    """Returns the scenes' images (N, 3, 64, 64) in [0, 1]."""
    pixels = np.stack([render(scene, art) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0


def true_detections(scene: Scene) -> list[Detection]:
    """Returns what a perfect detector would find in a scene."""
    return [Detection(item.noun, item.color, float(item.x), float(item.y), 1.0) for item in scene.items]


def shows_exactly(content: Content, scene: Scene) -> bool:
    """Returns whether a scene shows the content and nothing else."""
    asked = Counter({(group.noun, group.color): group.count for group in content.groups})
    shown = Counter((item.noun, item.color) for item in scene.items)
    return asked == shown and is_correct(content, true_detections(scene))


@dataclass(frozen=True, slots=True)
class Captioned:
    """A prompt: a content in words, in one of the wordings."""

    words: Content
    template: str

    @property
    def text(self) -> str:
        """The prompt."""
        return caption(self.words, self.template)

    @property
    def content(self) -> Content:
        """What the prompt asks for."""
        return meant(self.words, self.template)


def _captioned(rng: random.Random, words: Content, split: Split | None) -> Captioned | None:
    """Returns a prompt of these words in a split (None: in any), or None if the split has none."""
    allowed = [t for t in TEMPLATES if split is None or split_of(words, t) == split]
    return Captioned(words, rng.choice(allowed)) if allowed else None


def sample_captioned(rng: random.Random, split: Split | None) -> Captioned:
    """Samples a prompt of the split."""
    while True:
        prompt = _captioned(rng, sample_content(rng, rng.choice(SAMPLED_FAMILIES)), split)
        if prompt is not None:
            return prompt


def sample_near_miss(rng: random.Random, prompt: Captioned, split: Split | None) -> Captioned:
    """Samples a prompt of the split that asks for something else.

    In most cases one fact is changed; half of the prompts with a colour keep their words and get another
    wording. If all near misses of the words are in the other split, it is a near miss of a near miss.
    """
    words = prompt.words
    if prompt.words.groups[0].color is not None and rng.random() < REWORDED:
        missed = _captioned(rng, words, split)
        if missed is not None and missed.content != prompt.content:
            return missed
    while True:
        words = near_miss(words, rng)
        missed = _captioned(rng, words, split)
        if missed is not None and missed.content != prompt.content:
            return missed


def sample_pairs(
    rng: random.Random, groups: int, art: Art, split: Split | None, same_layout: float
) -> PairBatch:
    """Samples a batch; a share `same_layout` of the rejected images has the layout of the preferred one."""
    scenes: list[Scene] = []
    texts: list[str] = []
    degraded: list[int] = []
    for group in range(groups):
        right = sample_captioned(rng, split)
        misses = [sample_near_miss(rng, right, split) for _ in range(GROUP_TEXTS - 1)]
        preferred = sample_scene(rng, right.content, "fluent")
        rejected = preferred if rng.random() < same_layout else sample_scene(rng, right.content, "fluent")
        if rng.random() < DEGRADED:
            degraded.append(group * GROUP_IMAGES + 1)
        else:
            rejected = replace(rejected, style="noto")
        scenes += [preferred, rejected, *(sample_scene(rng, missed.content) for missed in misses)]
        texts += [right.text, *(missed.text for missed in misses)]
    images = render_all(scenes, art)
    if degraded:
        images[degraded] = degrade(images[degraded], torch.Generator().manual_seed(rng.getrandbits(31)))
    positive, negative = _labels(scenes, groups)
    return PairBatch(images, tokenize_batch(texts), positive, negative, scenes)


def _labels(scenes: list[Scene], groups: int) -> tuple[Tensor, Tensor]:
    positive = torch.zeros(groups * GROUP_IMAGES, groups * GROUP_TEXTS, dtype=torch.bool)
    for group in range(groups):
        for image, text in ((0, 0), (1, 0), (2, 1), (3, 2)):
            positive[group * GROUP_IMAGES + image, group * GROUP_TEXTS + text] = True
    prompts = [scenes[g * GROUP_IMAGES + k].content for g in range(groups) for k in (0, 2, 3)]
    negative = torch.tensor([[not shows_exactly(content, scene) for content in prompts] for scene in scenes])
    return positive, negative & ~positive


def sample_clutter(rng: random.Random) -> Content:
    """Samples up to four objects of any kinds, as a badly aligned model generates them."""
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
