"""`--set NAME=VALUE`: which widgets of a graph a name means, and whether they accept the value."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...errors import HyperAlignError, shown
from ..common.graphs.graph import Side, Stop, is_link
from .convert import Graph
from .files import ObjectInfo
from .texts import Address, feeder, text_widgets, widgets_of
from .widgets import Widget

SIDES: dict[str, Side] = {"prompt": "positive", "negative": "negative", "negative_prompt": "negative"}
SHOWN = 6
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
RANDOM = "random"
LARGEST_SEED = 2**32 - 1

Changes = dict[Address, Any]


Upload = Callable[[Path], str]
"""Sends a file to the server and returns its name there."""


def changes_of(graph: Graph, info: ObjectInfo, setting: str, upload: Upload | None = None) -> Changes:
    """Returns what a setting changes, by node and input.

    Args:
        graph: the workflow.
        info: the server's declarations.
        setting: `name=value`, `title.name=value`, `#id.name=value` or `*.name=value`.
        upload: receives the value where a node expects an image and the value is a local file.

    Raises:
        HyperAlignError: no widget has that name or several do, or one does not accept the value.
    """
    address, equals, text = setting.partition("=")
    if not equals or not address.strip():
        raise HyperAlignError(f"--set is {setting!r}; expected NAME=VALUE, as in --set seed=5.")
    known = _settable(graph, info)
    changes: Changes = {}
    for node, name in _meant(graph, info, known, address.strip(), setting):
        found = feeder(graph.prompt, info, node, name, known[node, name].kind)
        if found is None and name not in graph.prompt[node]["inputs"]:
            found = node, name  # the file leaves it to the server's default
        if found is None:
            raise HyperAlignError(
                f"The value of {_named(graph, (node, name))} comes over a link from "
                f"{_title(graph, graph.prompt[node]['inputs'][name][0])}; set it there, or remove the link."
            )
        changes[found] = _value(known[found], text, _named(graph, found), upload)
    return changes


def _settable(graph: Graph, info: ObjectInfo) -> dict[Address, Widget]:
    return {(node, one.name): one for node in graph.prompt for one in widgets_of(graph.prompt, info, node)}


def _meant(
    graph: Graph, info: ObjectInfo, known: dict[Address, Widget], address: str, setting: str
) -> list[Address]:
    if address in SIDES and (found := _prompts(graph, info, known, SIDES[address])):
        return found
    found = [one for one in known if one[1] == address]
    if not found:
        found, everywhere = _titled(graph, known, address)
        if everywhere:
            return found
    if not found:
        raise HyperAlignError(_unknown(graph, known, address))
    sources = {feeder(graph.prompt, info, node, name, known[node, name].kind) for node, name in found}
    if len(sources) > 1:
        raise HyperAlignError(_ambiguous(graph, found, setting))
    return found[:1]


def _prompts(graph: Graph, info: ObjectInfo, known: dict[Address, Widget], side: Side) -> list[Address]:
    """Returns the widgets that hold a prompt, with those of rewards that hold the same text.

    Raises HyperAlignError when several nodes hold different prompts, there is no negative one, or the graph
    does not say where the prompt is.
    """
    try:
        found = text_widgets(graph.prompt, info, side)
    except Stop as stop:
        raise HyperAlignError(
            f"The {side} prompt is not known: {stop}. Name its widget, as in --set '#5.text=...'."
        ) from stop
    try:
        other = text_widgets(graph.prompt, info, "positive" if side == "negative" else "negative")
    except Stop:  # such as a conditioning without text
        other = []
    if side == "negative" and found:
        found = [address for address in found if address not in other]
        if not found:
            raise HyperAlignError(
                "The workflow has no negative prompt of its own; it is made of the prompt. Set only prompt."
            )
    texts = {_text(graph, address) for address in found}
    if len({node for node, _ in found}) > 1 and len(texts) > 1:
        raise HyperAlignError(_ambiguous(graph, found, f"{'prompt' if side == 'positive' else side}=..."))
    if side == "negative":
        return found
    same = [one for one in known if known[one].is_text and _text(graph, one) in texts - {""}]
    same = [one for one in same if one not in (*found, *other)]
    return [*found, *same]


def _text(graph: Graph, address: Address) -> str:
    """Returns the text of a widget, nothing where it comes over a link."""
    value = graph.prompt[address[0]]["inputs"].get(address[1])
    return value if isinstance(value, str) else ""


def _titled(graph: Graph, known: dict[Address, Widget], address: str) -> tuple[list[Address], bool]:
    """Returns what `title.name`, `#id.name` or `*.name` means, and whether several are allowed."""
    for at in (position for position, letter in enumerate(address) if letter == "."):
        owner, name = address[:at], address[at + 1 :]
        found = [one for one in known if one[1] == name and _is_called(graph, one[0], owner)]
        if found:
            return found, owner == "*"
    return [], False


def _is_called(graph: Graph, node: str, owner: str) -> bool:
    if owner.startswith("#"):
        return node == owner[1:]
    titles = (*graph.titles[node], str(graph.prompt[node]["class_type"]))
    return owner == "*" or owner.casefold() in (title.casefold() for title in titles)


def _value(widget: Widget, text: str, named: str, upload: Upload | None) -> Any:
    """Returns a text as the widget's value. Raises HyperAlignError when the widget does not accept it."""
    choices = widget.choices
    if upload and widget.takes_files and text not in (choices or []) and Path(text).is_file():
        return upload(Path(text))
    if choices is not None:
        return _choice(choices, text, named)
    match widget.kind:
        case "INT" | "FLOAT":
            return _number(widget, text, named)
        case "BOOLEAN":
            if text.lower() not in TRUE + FALSE:
                raise HyperAlignError(f"{named} is set to {text!r}; expected true or false.")
            return text.lower() in TRUE
        case _:
            return text


def _choice(choices: Sequence[Any], text: str, named: str) -> Any:
    by_text = {str(choice): choice for choice in choices}
    if text not in by_text:
        shown = _listed(get_close_matches(text, by_text, SHOWN, 0.3) or by_text, len(by_text))
        raise HyperAlignError(f"{named} is set to {text!r}; expected one of {shown}.")
    return by_text[text]


def _number(widget: Widget, text: str, named: str) -> int | float:
    options = widget.options
    least, most = options.get("min", float("-inf")), options.get("max", float("inf"))
    if widget.has_control and text == RANDOM:
        return random.randint(max(0, int(least)), int(min(most, LARGEST_SEED)))
    what = "a whole number" if widget.kind == "INT" else "a number"
    try:
        number = int(text) if widget.kind == "INT" else float(text)
    except ValueError:
        raise HyperAlignError(f"{named} is set to {text!r}; expected {what}.") from None
    if not least <= number <= most:
        raise HyperAlignError(f"{named} is set to {text}; expected {what} from {least} to {most}.")
    return number


def _title(graph: Graph, node: str) -> str:
    title = graph.titles.get(node, ("",))[-1] or graph.prompt.get(node, {}).get("class_type", "no node")
    return f"{shown(title)} (#{node})"


def _named(graph: Graph, address: Address) -> str:
    return f"{address[1]} of {_title(graph, address[0])}"


def describe(graph: Graph, changes: Changes) -> str:
    """Returns a line that names the widgets and their new value."""
    where = ", ".join(_named(graph, address) for address in changes)
    return f"{where} = {next(iter(changes.values()))}"


def _ambiguous(graph: Graph, found: Sequence[Address], setting: str) -> str:
    shown = (
        f"{_named(graph, one)} (now {_now(graph.prompt[one[0]]['inputs'].get(one[1]))})"
        for one in found[:SHOWN]
    )
    node, name = found[0]
    value = setting.partition("=")[2]
    same = len({name for _, name in found}) == 1
    return (
        f"--set {setting} could mean {len(found)} widgets: {'; '.join(shown)}. Name one, as in "
        f"--set '#{node}.{name}={value}'" + (f", or --set '*.{name}={value}' for all." if same else ".")
    )


def _now(value: Any) -> str:
    return f"linked from #{value[0]}" if is_link(value) else shown(value)


def _unknown(graph: Graph, known: Iterable[Address], address: str) -> str:
    names = sorted({name for _, name in known})
    titled = [f"{graph.titles[node][-1]}.{name}" for node, name in known]
    near = get_close_matches(address, [*names, *titled], SHOWN)
    if near:
        return f"The workflow has no widget {address!r}; the nearest are {_listed(near, len(near))}."
    return f"The workflow has no widget {address!r}; it has {_listed(names, len(names)) or 'none'}."


def _listed(names: Iterable[str], total: int) -> str:
    shown = list(names)[: 3 * SHOWN]
    more = total - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
