"""The exception of the library for wrong input."""

from __future__ import annotations

LONGEST = 200


class HyperAlignError(ValueError):
    """Wrong input. The message states what was found, what was expected and how to fix it."""


def shown(value: object) -> str:
    """Returns what a message says of a value from a file, which may be of any length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, or lists in lists
        return f"a {type(value).__name__}"
    return shortened(text)


def shortened(text: str) -> str:
    """Returns at most the first LONGEST letters of a text, with a sign where some are missing."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
