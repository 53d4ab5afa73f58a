"""GenEval's prompts and their requirements, read from its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import HyperAlignError, shown
from ..tiny.prompts import RELATIONS, Relation

NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""GenEval's names of COCO's 80 classes, in COCO's order, which is that of the detector's outputs."""

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@dataclass(frozen=True, slots=True)
class Requirement:
    """`count` objects of a class, perhaps with a colour or a position relative to another."""

    name: str
    count: int
    color: str | None = None
    relation: Relation | None = None
    target: int = 0
    """With a relation: the index of the earlier requirement that it is relative to."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with the requirements on its images."""

    text: str
    tag: str
    """The task, such as `counting`."""
    include: tuple[Requirement, ...]
    """An image must show at least `count` of each."""
    exclude: tuple[Requirement, ...] = ()
    """An image must show fewer than `count` of each."""


def parse_prompt(metadata: Any) -> Prompt:
    """Returns the prompt of a line of GenEval's metadata.

    Raises HyperAlignError on a missing field, an unknown class, colour or relation, or a count below 1.
    """
    try:
        row = cast("Mapping[str, Any]", metadata)
        include = tuple(_requirement(item) for item in row["include"])
        exclude = tuple(_requirement(item) for item in row.get("exclude", ()))
        for index, item in enumerate(include):
            if item.relation is not None and not 0 <= item.target < index:
                raise ValueError(
                    f"{item.name} is {item.relation} object {item.target}, which is no earlier one"
                )
        return Prompt(str(row["prompt"]), str(row["tag"]), include, exclude)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise HyperAlignError(
            f"Found the metadata {shown(metadata)} ({shown(error)}); expected a line of GenEval's "
            "evaluation_metadata.jsonl with tag, prompt, include and perhaps exclude."
        ) from error


def _requirement(row: Mapping[str, Any]) -> Requirement:
    name, count, color = row["class"], int(row["count"]), row.get("color")
    relation, target = row.get("position", (None, 0))
    if name not in NAMES or count < 1:
        raise ValueError(f"{count} of {name!r}")
    if color is not None and color not in COLORS:
        raise ValueError(f"the colour {color!r}")
    if relation is not None and relation not in RELATIONS:
        raise ValueError(f"the relation {relation!r}")
    return Requirement(name, count, color, relation, int(target))


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """Returns the checked lines of a metadata file. Raises HyperAlignError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [cast("dict[str, Any]", json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise HyperAlignError(
            f"{path} cannot be read ({error}); expected GenEval's metadata, one JSON object per line."
        ) from error
    for row in rows:
        parse_prompt(row)
    if not rows:
        raise HyperAlignError(f"{path} is empty; expected GenEval's metadata, one JSON object per line.")
    return rows
