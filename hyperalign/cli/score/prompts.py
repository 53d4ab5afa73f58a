"""Where the prompt of each image comes from: one text, a table, text files, or ComfyUI's metadata."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image

from ...errors import HyperAlignError
from ...rewards.text import check_characters
from .images import DAMAGED

NAME_KEYS = ("name", "file_name", "filename", "file", "image", "path")
PROMPT_KEYS = ("prompt", "text", "caption")
SHOWN = 3
TEXT_INPUTS = ("text", "prompt", "text_g", "t5xxl", "clip_l", "clip_g", "text_l", "string", "value")
"""Where ComfyUI's text encoders, and the nodes that feed them, have their text."""

Graph = Mapping[str, Mapping[str, Any]]
"""ComfyUI's `prompt`: nodes by their ids, each with `class_type` and `inputs`."""


def find_prompts(folder: Path, names: Sequence[str], source: str) -> list[str]:
    """Returns one prompt per image.

    Args:
        folder: where the images lie.
        names: of the images, relative to it.
        source: `txt` for a text file beside each image, `comfyui` for the metadata of ComfyUI's PNGs, or
            the path of a table (.csv, .jsonl) that maps names to prompts.

    Raises:
        HyperAlignError: a table that cannot be read, images without a prompt, or half a character in one.
    """
    if source == "txt":
        found = {name: beside(folder / name) for name in names}
    elif source == "comfyui":
        found = {name: embedded(folder / name) for name in names}
    else:
        found = _of_table(names, read_table(Path(source)), source)
    if missing := [name for name in names if not (found.get(name) or "").strip()]:
        raise HyperAlignError(
            f"Found {len(names)} images and prompts for {len(names) - len(missing)} of them in {source}; "
            f"without one: {listed(missing)}. Add theirs."
        )
    prompts = [(found[name] or "").strip() for name in names]
    for name, prompt in zip(names, prompts, strict=True):
        check_characters(prompt, f" of {name}")
    return prompts


def listed(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def beside(path: Path) -> str | None:
    """Returns the text of the .txt file beside an image, None without one. Raises HyperAlignError."""
    text = path.with_suffix(".txt")
    return _read_text(text) if text.is_file() else None


def read_table(path: Path) -> dict[str, str]:
    """Reads names and prompts from a .csv with a header, or a .jsonl with an object per line.

    Raises HyperAlignError on a file that is missing, of another kind or damaged, or that has one name with
    two prompts.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise HyperAlignError(
            f"--prompts is {str(path)!r}; expected a .csv or .jsonl file, or the word txt (a text file "
            "beside each image) or comfyui (the PNGs' metadata)."
        )
    if not path.is_file():
        raise HyperAlignError(f"There is no table of prompts {path}; give a .csv or .jsonl file.")
    table: dict[str, str] = {}
    for number, row in _rows(path):
        name, prompt = _first(row, NAME_KEYS), _first(row, PROMPT_KEYS)
        if name is None or prompt is None:
            raise HyperAlignError(
                f"{path.name}, line {number}: found the fields {', '.join(map(str, row)) or 'none'}; "
                f"expected a name ({', '.join(NAME_KEYS)}) and a prompt ({', '.join(PROMPT_KEYS)})."
            )
        key = name.replace("\\", "/").removeprefix("./")
        if table.setdefault(key, prompt) != prompt:
            raise HyperAlignError(f"{path.name}, line {number}: {name} has another prompt above; keep one.")
    return table


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    text = _read_text(path)
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise HyperAlignError(
                f"{path.name}, line {reader.line_num} is not CSV ({error}). Save the table again."
            ) from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise HyperAlignError(f"{path.name}, line {number} is not JSON ({error}). Correct it.") from error
        yield number, cast("dict[str, Any]", row) if isinstance(row, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise HyperAlignError(f"{path} cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from error


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    lowered = {str(key).strip().lower(): value for key, value in row.items()}
    return next((value for key in keys if isinstance(value := lowered.get(key), str)), None)


def _of_table(names: Sequence[str], table: Mapping[str, str], source: str) -> dict[str, str]:
    """Looks images up by their relative path, or by their bare name where no two images share it."""
    paths = set(names)
    last_parts = {name: name.rsplit("/", 1)[-1] for name in names if name not in table}
    by_last_part = {
        name: table[last] for name, last in last_parts.items() if last in table and last not in paths
    }
    images = Counter(last_parts.values())
    if ambiguous := [name for name in by_last_part if images[last_parts[name]] > 1]:
        raise HyperAlignError(
            f"{source} has only the last part of {listed(ambiguous)}, which several folders share. Give the "
            "paths below the folder of images."
        )
    return {name: table[name] for name in names if name in table} | by_last_part


def embedded(path: Path) -> str | None:
    """Returns the positive prompt in the metadata of one of ComfyUI's images, None without one."""
    try:
        with Image.open(path) as opened:
            text = cast("dict[str, Any]", opened.info).get("prompt")
        graph: Any = json.loads(text) if isinstance(text, str) else None
    except DAMAGED:
        return None
    return positive_prompt(cast("Graph", graph)) if isinstance(graph, dict) else None


def positive_prompt(graph: Graph) -> str | None:
    """Returns the text that the positive conditioning of a ComfyUI graph was encoded from.

    It is what the text encoders upstream of the inputs called `positive` say; in graphs that have none
    (FLUX's guider), upstream of `conditioning`; or else what any text encoder says.
    """
    nodes = {key: node for key, node in graph.items() if isinstance(node.get("inputs"), dict)}
    for wanted in ("positive", "conditioning"):
        links = [node["inputs"].get(wanted) for node in nodes.values()]
        texts = [text for link in links for text in _texts_above(nodes, link, frozenset())]
        if texts:
            return ", ".join(dict.fromkeys(texts))
    texts = [text for node in nodes.values() if _is_encoder(node) for text in _texts(nodes, node)]
    return ", ".join(dict.fromkeys(texts)) or None


def _is_encoder(node: Mapping[str, Any]) -> bool:
    return "TextEncode" in str(node.get("class_type"))


def _texts_above(nodes: Graph, link: Any, passed: frozenset[str]) -> Iterator[str]:
    """Yields the texts encoded upstream of a link, along conditionings alone."""
    if not isinstance(link, list) or len(cast("list[Any]", link)) != 2:
        return
    key, slot = str(cast("list[Any]", link)[0]), cast("list[Any]", link)[1]
    if key not in nodes or key in passed:
        return
    inputs = nodes[key]["inputs"]
    if _is_encoder(nodes[key]):
        yield from _texts(nodes, nodes[key])
    elif "positive" in inputs:  # it hands both on, the positive one first
        yield from _texts_above(nodes, inputs.get("negative" if slot == 1 else "positive"), passed | {key})
    else:
        for name, above in inputs.items():
            if "conditioning" in name.lower():
                yield from _texts_above(nodes, above, passed | {key})


def _texts(nodes: Graph, node: Mapping[str, Any]) -> Iterator[str]:
    """Yields the text of a text encoder: its own, or that of the node that feeds it."""
    for name in TEXT_INPUTS:
        text: Any = node["inputs"].get(name)
        if isinstance(text, list) and text and str(text[0]) in nodes:
            feeder = nodes[str(text[0])]["inputs"]
            text = next((feeder[key] for key in TEXT_INPUTS if isinstance(feeder.get(key), str)), None)
        if isinstance(text, str) and text.strip():
            yield text.strip()
            return
