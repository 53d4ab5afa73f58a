"""Converts workflows from the page's format to the API format, and keeps where the page stores each value."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import HyperAlignError, shown
from ..common.graphs.graph import is_link
from .files import ObjectInfo, Prompt, Workflow, is_workflow
from .levels import Level, Place, Source, root, source_of
from .off import notes
from .widgets import places, widgets

EVERYWHERE = ("Anything Everywhere", "Prompts Everywhere", "Seed Everywhere")
"""Nodes of the pack Use Everywhere; some have one more sign."""
GROUP = ("workflow>", "workflow/")
SHOWN = 10


@dataclass(frozen=True, slots=True)
class Graph:
    """A workflow ready to run, whose values can be set."""

    prompt: Prompt
    places: Mapping[tuple[str, str], Place]
    """By node and input: where the workflow file stores the value."""
    titles: Mapping[str, tuple[str, ...]]
    """By node: the titles of the subgraphs around it, then its own."""
    workflow: Workflow | None
    """The page's format, None for a file in API format."""
    notes: tuple[str, ...] = ()
    """What switched-off nodes leave out of a run."""

    def with_values(self, changes: Mapping[tuple[str, str], Any]) -> Graph:
        """Returns a copy with other values by node and input, also in the page's format.

        Two uses of a subgraph share its nodes. The page's format cannot express a change in only one of them;
        the copy then has no workflow.
        """
        changed = copy.deepcopy(self)
        owners = Counter((id(place.container), place.key) for place in changed.places.values())
        split = False
        for (node, name), value in changes.items():
            changed.prompt[node]["inputs"][name] = value
            place = changed.places.get((node, name))
            if place is not None:
                place.container[place.key] = value
                split = split or owners[id(place.container), place.key] > 1
        return replace(changed, workflow=None if split else changed.workflow)


def read(content: Workflow | Prompt, info: ObjectInfo) -> Graph:
    """Makes a workflow of either format ready to run.

    Raises HyperAlignError when the server lacks a node, links form a cycle, or all outputs are switched off.
    """
    try:
        return _read(copy.deepcopy(content), info)
    except RecursionError as error:
        raise HyperAlignError(
            "The workflow has hundreds of reroutes or subgraphs in a row; expected fewer. Link their ends "
            "directly, or export the workflow with Export (API)."
        ) from error


def _read(content: Workflow | Prompt, info: ObjectInfo) -> Graph:
    if not is_workflow(content):
        found: Prompt = content
        check_known({node["class_type"]: "" for node in found.values()}, info)
        for node in found.values():
            node["_meta"] = node.get("_meta") or {}
        titles = {key: (str(node["_meta"].get("title") or ""),) for key, node in found.items()}
        return Graph(found, {}, titles, None)
    whole = root(content)
    nodes = list(whole.running())
    _check_links(nodes)
    check_known({node["type"]: _pack(node) for _, _, node in nodes if _matters(node, info)}, info)
    prompt: Prompt = {}
    at: dict[tuple[str, str], Place] = {}
    titles: dict[str, tuple[str, ...]] = {}
    for level, key, node in nodes:
        if node["type"] in info:
            number = level.id_of(key)
            title = str(node.get("title") or info[node["type"]].get("display_name") or node["type"])
            inputs = _inputs(level, key, node, info, at)
            prompt[number] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
            titles[number] = (*level.titles(), title)
    for node in prompt.values():  # muted nodes have no outputs
        node["inputs"] = {k: v for k, v in node["inputs"].items() if not is_link(v) or v[0] in prompt}
    return Graph(prompt, at, titles, content, notes(whole, prompt, info))


def to_prompt(workflow: Workflow | Prompt, info: ObjectInfo) -> Prompt:
    """Returns a workflow of either format in API format. Raises HyperAlignError as `read` does."""
    return read(workflow, info).prompt


def upstream(prompt: Prompt, node: str) -> Iterator[str]:
    """Yields a node and, nearest first, every node it depends on."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop(0)
        yield current
        for value in prompt[current]["inputs"].values():
            if is_link(value) and str(value[0]) in prompt and str(value[0]) not in seen:
                seen.add(str(value[0]))
                waiting.append(str(value[0]))


def check_known(kinds: Mapping[str, str], info: ObjectInfo) -> None:
    """Raises HyperAlignError unless the server knows all types of nodes; values name their packs."""
    missing = sorted(kind for kind in kinds if kind not in info)
    if groups := [kind for kind in missing if kind.startswith(GROUP)]:
        raise HyperAlignError(
            f"The workflow uses the group node {shown(groups[0])}, which only ComfyUI's page knows; convert "
            "it to a subgraph there, or export the workflow with Export (API)."
        )
    if missing:
        named = ", ".join(
            shown(kind) + (f" (of {kinds[kind]})" if kinds[kind] else "") for kind in missing[:SHOWN]
        )
        named += f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise HyperAlignError(
            f"The workflow uses {named}, which this ComfyUI does not know; install its pack, or "
            "remove the node from the workflow."
        )


def _check_links(nodes: Iterable[tuple[Level, str, dict[str, Any]]]) -> None:
    """Raises HyperAlignError at nodes that make links which a saved workflow does not have."""
    for level, key, node in nodes:
        properties = node.get("properties") or {}
        everywhere = (properties.get("ue_properties") or {}).get("ue_convert")
        if everywhere or str(node["type"]).startswith(EVERYWHERE):
            raise HyperAlignError(
                f"The node {shown(node['type'])} (#{level.id_of(key)}) sends its input to others over links "
                "that only ComfyUI's page knows; export the workflow there with Export (API), or link "
                "its inputs."
            )


def _inputs(
    level: Level, key: str, node: dict[str, Any], info: ObjectInfo, at: dict[tuple[str, str], Place]
) -> dict[str, Any]:
    number = level.id_of(key)
    found = places(node, info[node["type"]])
    own = {name: Place(node["widgets_values"], where) for name, (_, where) in found.items()}
    links: dict[str, Any] = {}
    for slot, socket in enumerate(node.get("inputs") or []):
        name, source = str(socket["name"]), source_of(level, key, slot)
        if isinstance(source, Place):
            own[name] = source
        elif isinstance(source, Source):
            links[name] = [source.node, source.slot]
            own.pop(name, None)
    at |= {(number, name): place for name, place in own.items()}
    values = {name: place.value for name, place in own.items()}
    # A workflow of an older version lacks newer widgets; the page gives them their defaults.
    later = (widget for widget in widgets(info[node["type"]], values) if widget.name not in values)
    values |= {widget.name: widget.default for widget in later if widget.default is not None}
    # The server reads a list as a link.
    return {k: {"__value__": v} if isinstance(v, list) else v for k, v in values.items()} | links


def _matters(node: dict[str, Any], info: ObjectInfo) -> bool:
    """Whether the server must know a node: not if it is linked to nothing, like the page's own helpers."""
    ends = [socket.get("link") for socket in node.get("inputs") or []]
    ends += [link for socket in node.get("outputs") or [] for link in socket.get("links") or []]
    return node["type"] in info or any(end is not None for end in ends)


def _pack(node: dict[str, Any]) -> str:
    properties = node.get("properties") or {}
    return str(properties.get("cnr_id") or properties.get("aux_id") or "")
