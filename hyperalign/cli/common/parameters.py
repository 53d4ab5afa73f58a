"""The prompt in `parameters`, the text that AUTOMATIC1111's web UI and others store in images."""

from __future__ import annotations

from .graphs.prompt import Found

SETTINGS, NEGATIVE = "Steps: ", "Negative prompt:"
PLACEHOLDER = "unknown"
"""What the node Image Saver writes where nobody has linked a prompt to it."""


def is_parameters(text: str) -> bool:
    """Whether a text has the line of settings that ends a prompt."""
    return any(line.startswith(SETTINGS) for line in _lines(text))


def prompt_of(text: str) -> Found:
    """Returns the lines before the negative prompt, or before the settings where there is none."""
    lines = _lines(text)
    settings = [at for at, line in enumerate(lines) if line.startswith(SETTINGS)]
    negative = [at for at, line in enumerate(lines) if line.startswith(NEGATIVE)]
    if not settings:
        return Found(None, f"its parameters have no line that starts with {SETTINGS!r}")
    if len(negative) > 1 or (negative and negative[0] > settings[0]):
        return Found(None, f"more than one line of its parameters could be where {NEGATIVE!r} starts")
    if not negative and len(settings) > 1:
        return Found(None, f"{len(settings)} lines of its parameters start with {SETTINGS!r}")
    found = "\n".join(lines[: (negative or settings)[0]]).strip()
    if found == PLACEHOLDER:
        return Found(None, f"its parameters say {PLACEHOLDER!r}")
    return Found(found)


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").split("\n")
