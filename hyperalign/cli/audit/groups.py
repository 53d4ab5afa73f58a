"""The prompts of a template, and the groups that images belong to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import HyperAlignError
from ..common.tables import NAME_KEYS, PROMPT_KEYS, image_name, read_rows, value_of

SLOT = re.compile(r"\{([^{}]*)\}")

Groups = dict[str, dict[str, str]]
"""By attribute: the group of each image that has one."""


def expand(template: str) -> list[str]:
    """Returns the prompts of a template: `a {red|blue} {cat|dog}` has four.

    Raises HyperAlignError without a slot of at least two terms, or with braces that do not close.
    """
    slots = [[term.strip() for term in slot.split("|")] for slot in SLOT.findall(template)]
    broken = not slots or any(len(terms) < 2 for terms in slots) or re.search(r"[{}]", SLOT.sub("", template))
    if broken:
        raise HyperAlignError(
            f"The template is {template!r}; expected terms in braces: 'a photo of a {{nurse|doctor}}'."
        )
    pieces = SLOT.split(template)[::2]
    return [
        "".join(piece + term for piece, term in zip(pieces, (*terms, ""), strict=True))
        for terms in itertools.product(*slots)
    ]


def groups_of(source: str, prompts: Mapping[str, str], names: Sequence[str]) -> Groups:
    """Returns the groups of images.

    Args:
        source: `attribute=first|second|...`, whose terms are searched as whole words in the images' prompts;
            or a .csv or .jsonl of the images' names with a column for each attribute.
        prompts: by the images' names; may be empty for a table.
        names: of all images.

    Raises:
        HyperAlignError: neither of both, a file that cannot be read, or fewer than two groups.
    """
    attribute, is_inline, terms = source.partition("=")
    if is_inline and not Path(source).is_file():
        found = {attribute.strip(): _by_terms([term.strip() for term in terms.split("|")], prompts, source)}
    else:
        found = _by_table(Path(source), set(names))
    for name, members in found.items():
        if len(set(members.values())) < 2:
            raise HyperAlignError(
                f"--groups {source}: {name} has {len(set(members.values()))} groups among the images, "
                f"expected two or more. Check the terms, or the names in the table; an image is {names[0]}."
            )
    return found


def _by_terms(terms: Sequence[str], prompts: Mapping[str, str], source: str) -> dict[str, str]:
    """Returns the one term in each prompt; images with none or with several belong to no group."""
    if not prompts:
        raise HyperAlignError(
            f"--groups {source} searches the images' prompts, and there are none; give --prompts, or a table."
        )
    members: dict[str, str] = {}
    for name, prompt in prompts.items():
        hits = [
            term for term in terms if re.search(rf"(?<!\w){re.escape(term)}(?!\w)", prompt, re.IGNORECASE)
        ]
        if len(hits) == 1:
            members[name] = hits[0]
    return members


def _by_table(path: Path, names: set[str]) -> Groups:
    found: Groups = {}
    for number, row in read_rows(path, "--groups", "terms such as 'gender=woman|man'"):
        name = value_of(row, NAME_KEYS)
        if name is None:
            raise HyperAlignError(
                f"{path.name}, line {number} has no name, only {', '.join(row) or 'nothing'}; expected one "
                f"of {', '.join(NAME_KEYS)}."
            )
        image = image_name(name)
        for key, value in row.items():
            is_group = key.strip().lower() not in (*NAME_KEYS, *PROMPT_KEYS) and value not in (None, "")
            if is_group and image in names:
                found.setdefault(key.strip(), {})[image] = str(value)
    if not found:
        raise HyperAlignError(f"{path} has no group of an image; expected a column for each attribute.")
    return found
