"""The prompt grammar of EmojiScenes: GenEval's six families over a small closed vocabulary.

A `Content` states what an image must show; `caption` puts it into words; `near_miss` changes one fact of
it. Training data, preference pairs and the rule-based score all start from a `Content`.

What is preferred depends on the wording: three of the five wordings have a palette, in which a colour word
means another colour (`meant`). The base model has never seen an image of a palette, and takes colour words
literally in every wording.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from ..errors import HyperAlignError

Family = Literal["single_object", "two_object", "counting", "colors", "position", "color_attribution"]
Relation = Literal["left of", "right of", "above", "below"]
Split = Literal["train", "test"]

FAMILIES: tuple[Family, ...] = get_args(Family)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
MIRRORED: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
SHAPES = ("heart", "circle", "square")
THINGS = (
    "dog", "cat", "fish", "apple", "banana", "tree", "car", "rocket", "sun", "moon",
    "umbrella", "key", "guitar", "bell", "mushroom", "cactus", "pizza", "donut", "crown",
    "frog", "penguin", "pig", "strawberry", "carrot", "snowman", "ghost", "robot", "house",
)  # fmt: skip
NOUNS = THINGS + SHAPES
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"fish": "fish", "strawberry": "strawberries", "cactus": "cactuses", "snowman": "snowmen"}
TEMPLATES = ("{}", "a picture of {}", "an emoji of {}", "a drawing of {}", "an icon of {}")
WORDINGS = ("{}", "an icon of {}")
"""Those of training and validation prompts, if nothing else is said: two palettes."""
PALETTES = {"an emoji of {}": 2, "a drawing of {}": 4, "an icon of {}": 6}
"""How many places further in COLORS the colour lies that a colour word means in a wording."""


@dataclass(frozen=True, slots=True)
class Group:
    """`count` copies of one noun, `color` only for shapes (things have colours of their own)."""

    noun: str
    color: str | None = None
    count: int = 1

    def phrase(self) -> str:
        """Returns the group in words: "a red heart", "three dogs"."""
        noun = self.noun if self.count == 1 else plural(self.noun)
        words = [self.color, noun] if self.color else [noun]
        if self.count > 1:
            return " ".join([COUNT_WORDS[self.count], *words])
        article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words])


@dataclass(frozen=True, slots=True)
class Content:
    """What a scene must show; `relation` places the first group relative to the second."""

    family: Family
    groups: tuple[Group, ...]
    relation: Relation | None = None

    def phrase(self) -> str:
        """Returns the content in words, without a template."""
        joiner = f" {self.relation} " if self.relation else " and "
        return joiner.join(group.phrase() for group in self.groups)


def plural(noun: str) -> str:
    """Returns the plural of a noun of the vocabulary."""
    return PLURALS.get(noun, noun + "s")


def caption(content: Content, template: str = "{}") -> str:
    """Returns the prompt for a content."""
    return template.format(content.phrase())


def meant(content: Content, template: str) -> Content:
    """Returns the content that the words of a content ask for in a wording: its palette's colours."""
    further = PALETTES.get(template, 0)

    def recolored(group: Group) -> Group:
        if group.color is None:
            return group
        return replace(group, color=COLORS[(COLORS.index(group.color) + further) % len(COLORS)])

    return replace(content, groups=tuple(recolored(group) for group in content.groups))


def content_of(prompt: str) -> Content:
    """Returns what a prompt asks for, in its wording's palette. Case, commas and full stops do not matter.

    Raises HyperAlignError on a prompt that the grammar does not contain.
    """
    text = " ".join(re.findall(r"[^\s,.]+", prompt.lower()))
    for template in TEMPLATES:
        prefix = template.removesuffix("{}")
        content = _read_phrase(text.removeprefix(prefix)) if text.startswith(prefix) else None
        if content is not None:
            return meant(content, template)
    raise HyperAlignError(
        f"The prompt {prompt!r} is not one of the tiny model's six families, such as 'a red heart', 'three "
        "dogs' or 'a dog left of a cat'; so nothing can check its images. Use another prompt."
    )


def _read_phrase(text: str) -> Content | None:
    """Returns the content of a phrase, None if it has none."""
    groups = _groups()
    if text in groups:
        group = groups[text]
        single: Family = "counting" if group.count > 1 else "colors" if group.color else "single_object"
        return Content(single, (group,))
    for relation in (None, *RELATIONS):
        first, found, second = text.partition(f" {relation or 'and'} ")
        if found and first in groups and second in groups:
            pair = (groups[first], groups[second])
            colored = {group.color is not None for group in pair}
            if len(colored) > 1 or any(group.count > 1 for group in pair):
                return None
            if relation is not None:
                return Content("position", pair, relation)
            return Content("color_attribution" if pair[0].color else "two_object", pair)
    return None


@lru_cache(maxsize=1)
def _groups() -> dict[str, Group]:
    """Returns every group of the grammar by its phrase."""
    things = [Group(noun, None, count) for noun in THINGS for count in (1, *COUNT_WORDS)]
    shapes = [Group(noun, color, count) for noun in SHAPES for color in COLORS for count in (1, *COUNT_WORDS)]
    return {group.phrase(): group for group in things + shapes}


def split_of(content: Content, template: str = "{}") -> Split:
    """Returns which split a prompt belongs to; about one in five is `test`.

    Families with many contents are split by content, so that no wording of a test content is
    trained on; the two small ones (28 things, 24 coloured shapes) by the full prompt.
    """
    small = content.family in ("single_object", "colors")
    key = caption(content, template if small else "{}")
    if content.family == "position" and content.relation is not None:
        # "a left of b" and "b right of a" are one scene and must share a split.
        first, second = content.groups
        mirrored = Content("position", (second, first), MIRRORED[content.relation]).phrase()
        key = min(key, mirrored)
    elif len(content.groups) == 2:
        key = min(key, Content(content.family, content.groups[::-1]).phrase())
    return "test" if zlib.crc32(key.encode()) % 5 == 0 else "train"


def sample_content(rng: random.Random, family: Family | None = None) -> Content:
    """Samples a content, uniformly over families unless one is given."""
    family = family or rng.choice(FAMILIES)
    if family == "single_object":
        return Content(family, (Group(rng.choice(THINGS)),))
    if family == "colors":
        return Content(family, (_shape(rng),))
    if family == "counting":
        group = _shape(rng) if rng.random() < 0.4 else Group(rng.choice(THINGS))
        return Content(family, (replace(group, count=rng.choice((2, 3, 4))),))
    if family == "color_attribution":
        first = _shape(rng)
        second = _shape(rng)
        while second.noun == first.noun or second.color == first.color:
            second = _shape(rng)
        return Content(family, (first, second))
    first, second = (Group(noun) for noun in rng.sample(THINGS, 2))
    relation = rng.choice(RELATIONS) if family == "position" else None
    return Content(family, (first, second), relation)


def sample_prompt(
    rng: random.Random, split: Split, family: Family | None = None, wordings: Sequence[str] = WORDINGS
) -> tuple[str, Content]:
    """Samples a prompt of the given split with the content that it asks for."""
    while True:
        content = sample_content(rng, family)
        template = rng.choice(wordings)
        if split_of(content, template) == split:
            return caption(content, template), meant(content, template)


def near_miss(content: Content, rng: random.Random) -> Content:
    """Returns the content with one fact changed: a count, a colour, a side or a noun."""
    first = content.groups[0]
    change_attribute = rng.random() < 0.7
    if content.family == "counting" and change_attribute:
        count = rng.choice([n for n in COUNT_WORDS if n != first.count])
        return replace(content, groups=(replace(first, count=count),))
    if content.family == "colors" and change_attribute:
        return replace(content, groups=(_recolored(first, rng),))
    if content.family == "position" and change_attribute and content.relation is not None:
        return replace(content, relation=MIRRORED[content.relation])
    if content.family == "color_attribution" and change_attribute:
        second = content.groups[1]
        swapped = (replace(first, color=second.color), replace(second, color=first.color))
        return replace(content, groups=swapped)
    index = rng.randrange(len(content.groups))
    groups = list(content.groups)
    groups[index] = _renamed(groups[index], rng, {group.noun for group in groups})
    return replace(content, groups=tuple(groups))


def _shape(rng: random.Random) -> Group:
    return Group(rng.choice(SHAPES), rng.choice(COLORS))


def _recolored(group: Group, rng: random.Random) -> Group:
    return replace(group, color=rng.choice([color for color in COLORS if color != group.color]))


def _renamed(group: Group, rng: random.Random, taken: set[str]) -> Group:
    pool = THINGS if group.color is None else SHAPES
    free = [noun for noun in pool if noun not in taken]
    return replace(group, noun=rng.choice(free)) if free else _recolored(group, rng)
