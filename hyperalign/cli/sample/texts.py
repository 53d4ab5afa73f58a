"""Finds a graph's prompt: the text from which the samplers' positive conditioning is encoded."""

from __future__ import annotations

from ..common.graphs.graph import Output, Side, TextGraph, is_link
from ..common.graphs.strings import HANDED_ON
from ..common.graphs.walk import Walk, declared_texts
from .files import ObjectInfo, Prompt
from .widgets import Widget, widgets

Address = tuple[str, str]
"""A node and one of its inputs."""


def text_widgets(prompt: Prompt, info: ObjectInfo, side: Side) -> list[Address]:
    """Returns the text widgets behind the samplers' positive or negative conditioning; none without samplers.

    A guider with a single conditioning (FLUX) has only a positive one.

    Raises:
        Stop: a node on the way does not say where its conditioning comes from.
    """

    def texts(graph: TextGraph, node: str) -> list[str]:
        own = [widget.name for widget in widgets_of(prompt, info, node) if widget.is_text]
        return own or declared_texts(graph, node)

    graph = TextGraph.of(prompt, {key: _outputs(info, node["class_type"]) for key, node in prompt.items()})
    slots = Walk(graph, texts).inputs(side)
    found: list[Address] = [feeder(prompt, info, *slot) or slot for slot in slots]
    return list(dict.fromkeys(found))


def _outputs(info: ObjectInfo, kind: str) -> list[Output]:
    kinds = info[kind].get("output") or []
    names = info[kind].get("output_name") or []
    names = [*names, *[""] * (len(kinds) - len(names))]
    return [Output(str(each), str(name)) for each, name in zip(kinds, names, strict=False)]


def widgets_of(prompt: Prompt, info: ObjectInfo, node: str) -> list[Widget]:
    """Returns the widgets of a node of the graph."""
    return widgets(info[prompt[node]["class_type"]], prompt[node]["inputs"])


def feeder(prompt: Prompt, info: ObjectInfo, node: str, name: str, kind: str = "STRING") -> Address | None:
    """Returns the widget that holds the value of an input of some type, through nodes that hand it on.

    It is the input's own widget, or the only one of its type upstream; None where there is no such one.
    """
    seen: set[str] = set()
    while is_link(value := prompt[node]["inputs"].get(name)):
        node = str(value[0])
        if node in seen or node not in prompt:
            return None
        seen.add(node)
        handed_on = HANDED_ON.get(prompt[node]["class_type"])
        alike = [one.name for one in widgets_of(prompt, info, node) if one.kind == kind]
        if handed_on is None and len(alike) != 1:
            return None
        name = handed_on or alike[0]
    return (node, name) if name in prompt[node]["inputs"] else None
