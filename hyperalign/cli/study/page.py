"""The page of a study: one HTML file that needs no other file and no network, and names no method."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .trials import Key

HERE = Path(__file__).parent


def render(
    key: Key, questions: Mapping[str, str], uris: Sequence[str], at: Mapping[tuple[str, str], int]
) -> str:
    """Returns the page.

    Args:
        key: of the study; no method and no file name of it goes into the page.
        questions: their texts.
        uris: the images.
        at: where each name and method has its image in `uris`.
    """
    trials = [
        {"id": one.id, "prompt": one.prompt, "images": [at[one.name, one.first], at[one.name, one.second]]}
        for one in key.trials
    ]
    asked = [{"key": name, "text": text} for name, text in questions.items()]
    content = {
        "id": key.study,
        "questions": asked,
        "trials": trials,
        "images": list(uris),
    }
    parts = {
        "title": html.escape(key.title),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        # Inside a script element only "<" could end it.
        "data": json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"),
    }
    page = (HERE / "page.html").read_text(encoding="utf-8")
    head, *rest = page.split("{{")
    return head + "".join(parts[name] + text for name, text in (one.split("}}", 1) for one in rest))
