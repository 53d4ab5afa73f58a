"""The trials of a study: pairs of methods on sides that a seed decides, and the key to the methods."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, cast

from ...errors import HyperAlignError

KEY_FORMAT = "hyperalign-study-key"
VERSION = 1

QUESTIONS = {
    "preference": "Which image do you prefer given the prompt?",
    "appeal": "Which image is more visually appealing?",
    "alignment": "Which image better fits the text description?",
}
"""Q1 to Q3 of the paper's user study (section 5.2.4)."""
QUESTIONS_WITHOUT_PROMPTS = {"preference": "Which image do you prefer?", "appeal": QUESTIONS["appeal"]}


@dataclass(frozen=True, slots=True)
class Trial:
    """One pair of images."""

    id: str
    """Random, so that it does not reveal the methods."""
    name: str
    """Of the images in their folders, without the extension."""
    prompt: str
    first: str
    second: str
    """Methods."""


@dataclass(frozen=True, slots=True)
class Key:
    """Which method generated which image; the page does not contain it."""

    study: str
    title: str
    seed: int
    methods: tuple[str, ...]
    questions: tuple[str, ...]
    trials: tuple[Trial, ...]

    def to_json(self) -> str:
        """Returns the key file's text."""
        content = {"format": KEY_FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def plan(
    prompts: Mapping[str, str], methods: Sequence[str], seed: int, against_first: bool = False
) -> list[Trial]:
    """Returns the trials in the order of the page.

    Args:
        prompts: by the names of the images.
        methods: at least two.
        seed: decides sides, order and ids. Each method of a pair is the first in half of its trials.
        against_first: only pairs of the first method with each other one, instead of all pairs.
    """
    generator = random.Random(seed)
    pairs = [pair for pair in combinations(methods, 2) if pair[0] == methods[0] or not against_first]
    trials: list[Trial] = []
    for pair in pairs:
        swaps = [bool(index % 2) for index in range(len(prompts))]
        generator.shuffle(swaps)
        for (name, prompt), swap in zip(prompts.items(), swaps, strict=True):
            first, second = reversed(pair) if swap else pair
            trials.append(Trial("", name, prompt, first, second))
    generator.shuffle(trials)
    ids = generator.sample(range(16**6), len(trials))
    return [
        Trial(f"{number:06x}", trial.name, trial.prompt, trial.first, trial.second)
        for number, trial in zip(ids, trials, strict=True)
    ]


def key_path(page: Path) -> Path:
    """Returns the path of a page's key."""
    return page.with_suffix(".key.json")


def read_key(path: Path) -> Key:
    """Reads a key file; the path may be that of its page.

    Raises HyperAlignError if there is none, or on another kind of file.
    """
    if path.suffix.lower() in (".html", ".htm"):
        path = key_path(path)
    if not path.is_file():
        raise HyperAlignError(
            f"There is no key {path}; it was written beside the page. If it is lost, make the study again "
            "with the same folders and options: that gives the same key."
        )
    content = read_json(path)
    if content.get("format") != KEY_FORMAT or content.get("version") != VERSION:
        raise HyperAlignError(
            f"{path} is no key of a study (found format {content.get('format')!r}, version "
            f"{content.get('version')!r}; expected {KEY_FORMAT!r}, {VERSION}). Give the page's .key.json."
        )
    try:
        return Key(
            content["study"], content["title"], content["seed"], tuple(content["methods"]),
            tuple(content["questions"]), tuple(Trial(**trial) for trial in content["trials"]),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise HyperAlignError(
            f"{path} is damaged ({error!r}); make the study again to get its key."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file. Raises HyperAlignError if there is none."""
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise HyperAlignError(f"{path} is not JSON ({error}); save or copy it again.") from error
    if not isinstance(content, dict):
        raise HyperAlignError(
            f"{path} contains a JSON {type(content).__name__}, expected an object; give the right file."
        )
    return cast("dict[str, Any]", content)
