"""Which prompts an image is scored under, and which groups it belongs to."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ...errors import HyperAlignError
from ..score.prompts import NAME_KEYS, PROMPT_KEYS

SLOT = re.compile(r"\{([^{}]*)\}")

Groups = dict[str, dict[str, str]]
"""By attribute: the group of each image that has one."""


def filled(template: str) -> list[str]:
    """Returns the prompts of a template: `a {red|blue} {cat|dog}` makes four.

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
        source: `attribute=first|second|...`, whose terms are looked for as whole words in the images'
            prompts; or a .csv or .jsonl with the images' names and a column for each attribute.
        prompts: by the images' names; may be empty for a table.
        names: of all images.

    Raises:
        HyperAlignError: neither of both, a file that cannot be read, or fewer than two groups.
    """
    attribute, is_inline, terms = source.partition("=")
    if is_inline and not Path(source).is_file():
        found = {attribute.strip(): _by_words([term.strip() for term in terms.split("|")], prompts, source)}
    else:
        found = _by_table(Path(source), set(names))
    for name, members in found.items():
        if len(set(members.values())) < 2:
            raise HyperAlignError(
                f"--groups {source}: {name} has {len(set(members.values()))} groups among the images, "
                f"expected two or more. Check the terms, or the names in the table; an image is {names[0]}."
            )
    return found


def _by_words(terms: Sequence[str], prompts: Mapping[str, str], source: str) -> dict[str, str]:
    """Returns the one term in each prompt; images with none or with several belong nowhere."""
    if not prompts:
        raise HyperAlignError(
            f"--groups {source} looks into the images' prompts, and there are none; give --prompts, "
            "or a table."
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
    for number, row in enumerate(_rows(path), 1):
        name = next((row[key] for key in row if key.strip().lower() in NAME_KEYS), None)
        if not isinstance(name, str):
            raise HyperAlignError(
                f"{path.name}, row {number} has no name, only {', '.join(row) or 'nothing'}; expected one of "
                f"{', '.join(NAME_KEYS)}."
            )
        image = name.replace("\\", "/").removeprefix("./")
        for key, value in row.items():
            is_group = key.strip().lower() not in (*NAME_KEYS, *PROMPT_KEYS) and value not in (None, "")
            if is_group and image in names:
                found.setdefault(key.strip(), {})[image] = str(value)
    if not found:
        raise HyperAlignError(f"{path} names no group of an image; expected a column for each attribute.")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise HyperAlignError(
            f"--groups is {str(path)!r}; expected a .csv or .jsonl file, or terms such as 'gender=woman|man'."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.lower() == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline=""), restkey="more"))
        lines: list[Any] = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [cast("dict[str, Any]", line) if isinstance(line, dict) else {} for line in lines]
    except (OSError, ValueError, csv.Error) as error:
        raise HyperAlignError(
            f"--groups {path} cannot be read ({error}). Give a whole file in UTF-8."
        ) from error
