"""The prompt in the metadata of ComfyUI's images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from PIL import Image

from ...image_files import DECODING_ERRORS

TEXT_INPUTS = ("text", "prompt", "text_g", "t5xxl", "clip_l", "clip_g", "text_l", "string", "value")
"""The inputs for text of ComfyUI's text encoders, and of the nodes that are connected to them."""

Graph = Mapping[str, Mapping[str, Any]]
"""ComfyUI's `prompt`: nodes by their ids, each with `class_type` and `inputs`."""


def embedded_prompt(path: Path) -> str | None:
    """Returns the positive prompt in the metadata of an image from ComfyUI, None without one."""
    try:
        with Image.open(path) as opened:
            text = cast("dict[str, Any]", opened.info).get("prompt")
        graph: Any = json.loads(text) if isinstance(text, str) else None
    except DECODING_ERRORS:
        return None
    return positive_prompt(cast("Graph", graph)) if isinstance(graph, dict) else None


def positive_prompt(graph: Graph) -> str | None:
    """Returns the text from which the positive conditioning of a ComfyUI graph was encoded, None without one.

    It is the text of the text encoders upstream of the inputs called `positive`; in graphs that have none
    (FLUX's guider), upstream of `conditioning`; without these, the text of all text encoders.
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
    """Yields the texts encoded upstream of a link, following conditionings only."""
    if not isinstance(link, list) or len(cast("list[Any]", link)) != 2:
        return
    key, slot = str(cast("list[Any]", link)[0]), cast("list[Any]", link)[1]
    if key not in nodes or key in passed:
        return
    inputs = nodes[key]["inputs"]
    if _is_encoder(nodes[key]):
        yield from _texts(nodes, nodes[key])
    elif "positive" in inputs:  # it returns both, the positive one first
        yield from _texts_above(nodes, inputs.get("negative" if slot == 1 else "positive"), passed | {key})
    else:
        for name, above in inputs.items():
            if "conditioning" in name.lower():
                yield from _texts_above(nodes, above, passed | {key})


def _texts(nodes: Graph, node: Mapping[str, Any]) -> Iterator[str]:
    """Yields the text of a text encoder: its own, or that of the node connected to it."""
    for name in TEXT_INPUTS:
        text: Any = node["inputs"].get(name)
        if isinstance(text, list) and text and str(text[0]) in nodes:
            source = nodes[str(text[0])]["inputs"]
            text = next((source[key] for key in TEXT_INPUTS if isinstance(source.get(key), str)), None)
        if isinstance(text, str) and text.strip():
            yield text.strip()
            return
