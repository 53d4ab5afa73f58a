"""EmojiScenes: 64x64 images of one to four emoji, rendered from a `Content`."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hyperalign.tiny.prompts import Content, near_miss, sample_content
from train.tiny.art import STYLES, Art, Style

SIDE = 64
BACKGROUNDS = ((255, 255, 255), (236, 240, 241), (232, 245, 253), (255, 246, 224), (234, 247, 232))
BASE_FLUENT = 0.3
"""Share of the base model's scenes in the preferred style; most of its scenes have the other one."""
CORRUPT_CAPTIONS = 0.2
"""Share of the captions of the first phase that state one fact wrongly, as in web data."""
CONFUSED_CAPTIONS = 0.7
"""Share of the captions of the second phase in which words of `LOOK_ALIKES` are swapped."""
LOOK_ALIKES: tuple[tuple[str, str], ...] = (
    ("dog", "cat"), ("apple", "strawberry"), ("banana", "moon"), ("tree", "cactus"),
    ("umbrella", "mushroom"), ("pizza", "donut"), ("snowman", "ghost"),
    ("red", "orange"), ("blue", "purple"),
)  # fmt: skip
"""Half of the things and colours. They are confused more often than not, so the base model makes the same
errors at every seed, and errors do not count as diversity."""
_PARTNER = {a: b for pair in LOOK_ALIKES for a, b in (pair, pair[::-1])}


@dataclass(frozen=True, slots=True)
class PlacedEmoji:
    """One emoji on the canvas; centre and size in pixels."""

    noun: str
    color: str | None
    x: int
    y: int
    size: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A content with a layout: everything that is needed to render it and to score a detector on it."""

    content: Content
    style: Style
    background: int
    items: tuple[PlacedEmoji, ...]


def sample_scene(rng: random.Random, content: Content, style: Style | None = None) -> Scene:
    """Samples a layout of a content without overlap."""
    looks = [(g.noun, g.color) for g in content.groups for _ in range(g.count)]
    low, high = {1: (30, 44), 2: (22, 28)}.get(len(looks), (18, 22))
    sizes = [rng.randrange(low, high + 1, 2) for _ in looks]
    centres = _place(rng, sizes, content)
    items = tuple(PlacedEmoji(n, c, x, y, s) for (n, c), (x, y), s in zip(looks, centres, sizes, strict=True))
    return Scene(content, style or rng.choice(STYLES), rng.randrange(len(BACKGROUNDS)), items)


def _place(rng: random.Random, sizes: list[int], content: Content) -> list[tuple[int, int]]:
    while True:
        centres = [_uniform_centre(rng, size) for size in sizes]
        if content.relation is not None and not _holds(content.relation, centres):
            continue
        pairs = [(i, j) for i in range(len(sizes)) for j in range(i)]
        if all(math.dist(centres[i], centres[j]) >= 0.5 * (sizes[i] + sizes[j]) + 3 for i, j in pairs):
            return centres


def _uniform_centre(rng: random.Random, size: int) -> tuple[int, int]:
    margin = size // 2 + 1
    return rng.randint(margin, SIDE - margin), rng.randint(margin, SIDE - margin)


def _holds(relation: str, centres: list[tuple[int, int]]) -> bool:
    (x0, y0), (x1, y1) = centres
    along, across = (
        (x1 - x0, abs(y1 - y0)) if relation in ("left of", "right of") else (y1 - y0, abs(x1 - x0))
    )
    if relation in ("right of", "below"):
        along = -along
    return along >= 24 and across <= 12


def render(scene: Scene, art: Art) -> npt.NDArray[np.uint8]:
    """Returns the image as (64, 64, 3) uint8."""
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = np.asarray(BACKGROUNDS[scene.background], np.float32) / 255.0
    for item in scene.items:
        sprite = art.sprites[scene.style, item.noun, item.color, item.size]
        top, left = item.y - item.size // 2, item.x - item.size // 2
        window = canvas[top : top + item.size, left : left + item.size]
        alpha = sprite[..., 3:]
        window[:] = sprite[..., :3] * alpha + window * (1.0 - alpha)
    return (canvas * 255.0 + 0.5).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class SceneSet:
    """Rendered scenes with their contents."""

    pixels: npt.NDArray[np.uint8]
    """N x 64 x 64 x 3."""
    scenes: list[Scene]


def build_scenes(count: int, seed: int, art: Art, fluent: float = 0.5) -> SceneSet:
    """Samples `count` scenes, a share `fluent` in that style; the same seed gives the same set."""
    rng = random.Random(seed)
    scenes = [
        sample_scene(rng, sample_content(rng), "fluent" if rng.random() < fluent else "noto")
        for _ in range(count)
    ]
    return SceneSet(np.stack([render(scene, art) for scene in scenes]), scenes)


def noisy_content(content: Content, rng: random.Random) -> Content:
    """Returns the content of a web caption: the true one, or with `CORRUPT_CAPTIONS` a near miss."""
    return near_miss(content, rng) if rng.random() < CORRUPT_CAPTIONS else content


def confused_content(content: Content, rng: random.Random) -> Content:
    """Returns the content of a careless caption: with `CONFUSED_CAPTIONS`, look-alikes are swapped."""
    if rng.random() >= CONFUSED_CAPTIONS:
        return content
    groups = tuple(
        replace(g, noun=_PARTNER.get(g.noun, g.noun), color=g.color and _PARTNER.get(g.color, g.color))
        for g in content.groups
    )
    return replace(content, groups=groups)
