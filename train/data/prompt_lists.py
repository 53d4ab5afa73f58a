"""Prompt lists to draw images of: prompts with what their file says about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from hyperalign.geneval.prompts import parse_prompt
from train.data.prompts import json_lines, load_prompts


def load_prompt_list(path: Path) -> list[dict[str, Any]]:
    """Returns the metadata of each prompt of a file, at least `prompt`.

    GenEval's lines (with `tag` and `include`) stay as they are, each at its place. Of other files, in any
    form that `load_prompts` takes, every distinct prompt comes once.

    Raises:
        HyperAlignError: as `load_prompts`, or a line of GenEval's that lacks something.
    """
    if path.suffix.lower() == ".jsonl" and path.is_file():
        rows = [row for _, row in json_lines(path)]
        if rows and all(isinstance(row, dict) and {"tag", "include"} <= row.keys() for row in rows):
            for row in rows:
                parse_prompt(row)
            return cast("list[dict[str, Any]]", rows)
    return [{"prompt": prompt} for prompt in load_prompts(path)]
