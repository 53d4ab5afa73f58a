"""Finds a graph's prompt: the text from which the samplers' positive conditioning is encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from .convert import is_link
from .files import ObjectInfo, Prompt
from .widgets import Widget, widgets

Side = Literal["positive", "negative"]
Address = tuple[str, str]
"""A node and one of its inputs."""


def text_widgets(prompt: Prompt, info: ObjectInfo, side: Side) -> list[Address]:
    """Returns the text widgets behind the samplers' positive or negative conditioning.

    A guider with a single conditioning (FLUX) has only a positive one.
    """
    names = (side, "conditioning") if side == "positive" else (side,)
    for name in names:
        links = (node["inputs"].get(name) for node in prompt.values())
        found = [address for link in links for address in _above(prompt, info, link, frozenset())]
        if found:
            return list(dict.fromkeys(found))
    return []


def widgets_of(prompt: Prompt, info: ObjectInfo, node: str) -> list[Widget]:
    """Returns the widgets of a node of the graph."""
    return widgets(info[prompt[node]["class_type"]], prompt[node]["inputs"])


def feeder(prompt: Prompt, info: ObjectInfo, node: str, widget: Widget) -> Address | None:
    """Returns the widget that holds an input's value: its own, or the only one of its kind upstream."""
    seen: set[str] = set()
    while is_link(value := prompt[node]["inputs"].get(widget.name)):
        node = value[0]
        if node in seen:
            return None
        seen.add(node)
        alike = [one for one in widgets_of(prompt, info, node) if one.kind == widget.kind]
        if len(alike) != 1:
            return None
        widget = alike[0]
    return node, widget.name


def _above(prompt: Prompt, info: ObjectInfo, link: Any, passed: frozenset[str]) -> Iterator[Address]:
    """Yields the text widgets upstream of a link, following only conditionings."""
    if not is_link(link) or link[0] not in prompt or link[0] in passed:
        return
    node, inputs = link[0], prompt[link[0]]["inputs"]
    texts = [widget for widget in widgets_of(prompt, info, node) if widget.is_text]
    if texts:
        yield from (feeder(prompt, info, node, one) or (node, one.name) for one in texts)
        return
    if "positive" in inputs and "negative" in inputs:  # it outputs both, the positive one first
        above = [inputs["negative" if link[1] == 1 else "positive"]]
    else:
        above = [value for value in inputs.values() if _is_conditioning(prompt, info, value)]
    for value in above:
        yield from _above(prompt, info, value, passed | {node})


def _is_conditioning(prompt: Prompt, info: Mapping[str, Any], value: Any) -> bool:
    if not is_link(value) or value[0] not in prompt:
        return False
    outputs = info[prompt[value[0]]["class_type"]].get("output") or []
    return value[1] < len(outputs) and outputs[value[1]] == "CONDITIONING"
