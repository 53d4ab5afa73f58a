"""One prompt for each image: from one text, from its lines, or from a list of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from .errors import HyperAlignError

Lines = Literal["one prompt", "one per image"]
LINES: tuple[Lines, ...] = get_args(Lines)
"""What the lines of a text are; the first is the default."""


def prompts_for(prompt: str | Sequence[str], count: int, lines: str = LINES[0]) -> list[str]:
    """Returns one prompt per image.

    Args:
        prompt: a text; or several, which are one for each image.
        count: of the images.
        lines: what the lines of a text are: "one prompt" of all images, or prompts of "one per image";
            a single line then is the prompt of all. Empty lines are left out.

    Raises:
        HyperAlignError: a wrong number of texts or lines.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    what = "prompts in a list"
    if len(texts) == 1 and lines == "one per image":
        texts, what = non_empty_lines(texts[0]) or [""], "lines of prompts"
    texts = [text.strip() for text in texts]
    if len(texts) == 1:
        return texts * count
    if len(texts) != count:
        raise HyperAlignError(
            f"Found {len(texts)} {what} for {count} images; expected 1 for all of them, or {count}, one per "
            "image. Set lines to 'one prompt' where the lines are one prompt."
        )
    return texts


def prompts_for_batches(prompt: str | Sequence[str], counts: Sequence[int], lines: str) -> list[str]:
    """Returns one prompt per image of several batches.

    A list of as many prompts as batches has one for each batch, as the host pairs two lists; other prompts
    are as in `prompts_for`, over all images.

    Args:
        prompt: a text, or several.
        counts: number of images of each batch.
        lines: as in `prompts_for`.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if len(texts) == len(counts) > 1:
        return [text.strip() for text, count in zip(texts, counts, strict=True) for _ in range(count)]
    return prompts_for(texts, sum(counts), lines)


def non_empty_lines(text: str) -> list[str]:
    """Returns the stripped lines of a text that are not empty; no sign but the line feed separates them."""
    return [line for raw in text.split("\n") if (line := raw.strip())]


def on_one_line(prompt: str) -> str:
    """Returns a prompt as a row of a table shows it."""
    return " ".join(prompt.split())
