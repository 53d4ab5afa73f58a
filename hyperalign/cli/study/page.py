"""The page of a study: one HTML file that needs no other file and no network, and contains no method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...pages import render
from .trials import Key

TEMPLATE = Path(__file__).with_name("page.html")


def page(
    key: Key, questions: Mapping[str, str], uris: Sequence[str], at: Mapping[tuple[str, str], int]
) -> str:
    """Returns the page.

    Args:
        key: of the study; the page contains no method and no file name of it.
        questions: their texts.
        uris: the images.
        at: the index in `uris` of each name and method.
    """
    content = {
        "id": key.study,
        "questions": [{"key": name, "text": text} for name, text in questions.items()],
        "trials": [
            {
                "id": one.id,
                "prompt": one.prompt,
                "images": [at[one.name, one.first], at[one.name, one.second]],
            }
            for one in key.trials
        ],
        "images": list(uris),
    }
    return render(TEMPLATE, title=key.title, study=content)
