"""The entities of prompts with their attributes, and the tokens that stand for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, cast

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from hyperalign.geneval.prompts import parse_prompt
from train.generation.options import DymoOptions

Group = tuple[str, ...]
"""An entity and its attributes, each a word or several, as the prompt has them."""
Count = Callable[[str], int]
"""Text -> its number of tokens in the base model's text encoder, without start and end."""
EXPECTED = '{"a red car and a bench": [["car", "red"], ["bench"]], ...}'


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of tokens, by their places in a prompt's context."""

    together: tuple[tuple[int, int], ...] = ()
    """An entity's token and one of its attributes'."""
    apart: tuple[tuple[int, int], ...] = ()
    """Tokens of two entities."""

    def __bool__(self) -> bool:
        """Returns whether there is any."""
        return bool(self.together or self.apart)


def pairs_of_prompts(own: DymoOptions, rows: Sequence[Mapping[str, Any]], count: Count | None) -> list[Pairs]:
    """Returns the pairs of each prompt; there are none where nothing tells them.

    Args:
        own: says whether there should be pairs, and which file has the entities.
        rows: metadata of each prompt; GenEval's has its objects and their colours.
        count: counts tokens; None where the base model has no cross-attention.

    Raises:
        HyperAlignError: a file that cannot be read or does not fit the prompts, or no pairs where
            `own.semantic` or a file asks for them.
    """
    given = own.entities != Path()
    if count is None:
        if own.semantic == "on" or given:
            raise HyperAlignError(
                f"--dymo.semantic is {own.semantic} and --dymo.entities {own.entities}, but the base model "
                "has no cross-attention, whose maps the semantic objective needs. Leave both out, which "
                "steers by the reward alone, or take SD 1.5 or SDXL."
            )
        return [Pairs()] * len(rows)
    if own.semantic == "off":
        return [Pairs()] * len(rows)
    listed = read_entities(own.entities, [row["prompt"] for row in rows]) if given else {}
    found = [
        pairs_of(row["prompt"], listed.get(row["prompt"], ()) if given else geneval_groups(row), count)
        for row in rows
    ]
    if own.semantic == "on" and not any(found):
        raise HyperAlignError(
            "--dymo.semantic is on, but no prompt has two entities or one with an attribute; expected "
            f"GenEval's metadata with some, or --dymo.entities with {EXPECTED}. Give such a file."
        )
    return found


def read_entities(path: Path, prompts: Sequence[str]) -> dict[str, list[Group]]:
    """Returns the groups of each prompt of a file.

    Raises HyperAlignError: it cannot be read, has another form, or fits none or not all words of the prompts.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HyperAlignError(
            f"--dymo.entities {path} cannot be read ({first_line(error)}); expected JSON, {EXPECTED}."
        ) from error
    if not _is_entities(found):
        raise HyperAlignError(
            f"--dymo.entities {path} has another form; expected prompts with lists of words, an entity "
            f"before its attributes: {EXPECTED}. Change it."
        )
    listed = {prompt: [tuple(group) for group in groups] for prompt, groups in found.items()}
    used = {prompt: groups for prompt, groups in listed.items() if prompt in set(prompts)}
    if not used:
        raise HyperAlignError(
            f"--dymo.entities {path} has {len(listed)} prompts, none of those of the list, whose first is "
            f"{prompts[0]!r}. Give the prompts word for word."
        )
    for prompt, groups in used.items():
        for phrase, span in zip((p for group in groups for p in group), spans(prompt, groups), strict=True):
            if span is None:
                raise HyperAlignError(
                    f"--dymo.entities {path} has {phrase!r}, which the prompt {prompt!r} does not have, or "
                    "not as often. Give words as the prompt has them."
                )
    return used


def _is_entities(found: object) -> bool:
    """Returns whether JSON has prompts with lists of groups, each of one text or more."""
    if not isinstance(found, dict):
        return False
    groups = [groups for groups in cast("dict[str, Any]", found).values()]
    if not all(isinstance(one, list) for one in groups):
        return False
    each = [group for one in groups for group in cast("list[Any]", one)]
    return all(
        isinstance(group, list)
        and group
        and all(isinstance(p, str) and p.strip() for p in cast("list[Any]", group))
        for group in each
    )


def geneval_groups(row: Mapping[str, Any]) -> list[Group]:
    """Returns the groups of a line of GenEval's metadata that are in its prompt; none of other metadata."""
    if not {"tag", "include"} <= row.keys():
        return []
    groups = [(item.name, item.color) if item.color else (item.name,) for item in parse_prompt(row).include]
    return [group for group in groups if None not in spans(row["prompt"], [group])]


def spans(prompt: str, groups: Sequence[Group]) -> list[slice | None]:
    """Returns the characters of each phrase, in the groups' order; None where a prompt does not have it.

    A phrase that several groups have is found once for each, from left to right.
    """
    taken, found = set[int](), list[slice | None]()
    for phrase in (phrase for group in groups for phrase in group):
        places = re.finditer(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", prompt, re.IGNORECASE)
        free = [slice(*place.span()) for place in places if taken.isdisjoint(range(*place.span()))]
        found.append(free[0] if free else None)
        taken.update(range(free[0].start, free[0].stop) if free else ())
    return found


def pairs_of(prompt: str, groups: Sequence[Group], count: Count) -> Pairs:
    """Returns the pairs of a prompt whose groups are all in it."""
    places = iter([_tokens(prompt, span, count) for span in spans(prompt, groups)])
    tokens = [[next(places) for _ in group] for group in groups]
    together = [
        pair for entity, *attributes in tokens for other in attributes for pair in product(entity, other)
    ]
    entities = [entity for entity, *_ in tokens]
    apart = [pair for one, other in combinations(entities, 2) for pair in product(one, other)]
    return Pairs(tuple(together), tuple(apart))


def _tokens(prompt: str, span: slice | None, count: Count) -> range:
    """Returns the places of characters in the context, which begins with a start token."""
    if span is None:
        return range(0)
    return range(1 + count(prompt[: span.start]), 1 + count(prompt[: span.stop]))
