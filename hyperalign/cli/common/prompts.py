"""The prompts of images: from a table, text files, or their metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import HyperAlignError, shortened
from ...rewards.text import check_characters
from .image_prompt import embedded_prompt
from .tables import NAME_KEYS, PROMPT_KEYS, image_name, read_rows, read_text, value_of

SHOWN = 3


def find_prompts(folder: Path, names: Sequence[str], source: str) -> list[str]:
    """Returns one prompt per image.

    Args:
        folder: of the images.
        names: of the images, relative to it.
        source: `txt` for a text file beside each image, `comfyui` for the metadata of the images, or the path
            of a table (.csv, .jsonl) of names and prompts.

    Raises:
        HyperAlignError: a table that cannot be read, images without a prompt, or half a character in one.
    """
    why: dict[str, str] = {}
    if source == "txt":
        found = {name: prompt_beside(folder / name) for name in names}
    elif source == "comfyui":
        answers = {name: embedded_prompt(folder / name) for name in names}
        found = {name: answer.text for name, answer in answers.items()}
        why = {name: answer.why or "it is empty" for name, answer in answers.items()}
    else:
        found = _look_up(names, read_prompts(Path(source)), source)
    if missing := [name for name in names if not (found.get(name) or "").strip()]:
        raise HyperAlignError(
            f"Found {len(names)} images and prompts for {len(names) - len(missing)} of them in {source}; "
            f"without one: {abridged(missing, why)}. Add theirs, as in a table (.csv or .jsonl)."
        )
    prompts = [(found[name] or "").strip() for name in names]
    for name, prompt in zip(names, prompts, strict=True):
        check_characters(prompt, f" of {name}")
    return prompts


def abridged(names: Sequence[str], why: Mapping[str, str] | None = None) -> str:
    """Returns the first names, each with its reason if there are reasons, and how many more there are."""
    shown = [f"{name} ({why[name]})" if why else name for name in names[:SHOWN]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown) + more


def prompt_beside(path: Path) -> str | None:
    """Returns the text of the .txt file beside an image, None without one. Raises HyperAlignError."""
    text = path.with_suffix(".txt")
    return read_text(text) if text.is_file() else None


def read_prompts(path: Path) -> dict[str, str]:
    """Reads prompts by image name from a .csv with a header, or a .jsonl with an object per line.

    Raises HyperAlignError on a file that is missing, of another kind or damaged, or that has two prompts for
    one name.
    """
    prompts: dict[str, str] = {}
    alternative = "txt (a text file beside each image) or comfyui (the images' metadata)"
    for number, row in read_rows(path, "--prompts", alternative):
        name, prompt = value_of(row, NAME_KEYS), value_of(row, PROMPT_KEYS)
        if name is None or prompt is None:
            raise HyperAlignError(
                f"{path.name}, line {number}: found the fields {shortened(', '.join(row)) or 'none'}; "
                f"expected a name ({', '.join(NAME_KEYS)}) and a prompt ({', '.join(PROMPT_KEYS)})."
            )
        if prompts.setdefault(image_name(name), prompt) != prompt:
            raise HyperAlignError(
                f"{path.name}, line {number}: {shortened(name)} has another prompt above; keep one."
            )
    return prompts


def _look_up(names: Sequence[str], prompts: Mapping[str, str], source: str) -> dict[str, str]:
    """Finds images by their relative path, or by their bare name where no two images share it."""
    paths = set(names)
    last_parts = {name: name.rsplit("/", 1)[-1] for name in names if name not in prompts}
    by_last_part = {
        name: prompts[last] for name, last in last_parts.items() if last in prompts and last not in paths
    }
    images = Counter(last_parts.values())
    if ambiguous := [name for name in by_last_part if images[last_parts[name]] > 1]:
        raise HyperAlignError(
            f"{source} has only the last part of {abridged(ambiguous)}, which several folders share. Give "
            "the paths below the folder of images."
        )
    return {name: prompts[name] for name in names if name in prompts} | by_last_part
