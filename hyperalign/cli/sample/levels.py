"""The page's graph with its subgraphs, and the source of each input's value.

It does what the page does before it queues: it expands subgraphs (ids like `12:3`), connects through
bypassed nodes (the first input of the same type), reroutes and pairs of Set and Get nodes, and replaces
primitive nodes by their values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...errors import HyperAlignError, shown
from .files import Workflow

MUTED, BYPASSED = 2, 4
PRIMITIVE = "PrimitiveNode"
SETS, GETS = ("SetNode", "easy setNode"), ("GetNode", "easy getNode")
THROUGH = ("Reroute", "Reroute (rgthree)", *SETS)
"""Nodes of the page whose output is their input."""
CONTROLS = (
    "Fast Muter (rgthree)", "Fast Bypasser (rgthree)", "Fast Groups Muter (rgthree)",
    "Fast Groups Bypasser (rgthree)", "Fast Actions Button (rgthree)", "Node Collector (rgthree)",
    "Mute / Bypass Repeater (rgthree)", "Mute / Bypass Relay (rgthree)", "Random Unmuter (rgthree)",
    "Bookmark (rgthree)", "Label (rgthree)",
)  # fmt: skip
"""Nodes that switch others on and off in the page, which it stores as those nodes' modes."""
VIRTUAL = (PRIMITIVE, *THROUGH, *GETS, *CONTROLS, "Note", "MarkdownNote")
"""Nodes that exist in the page only."""
MOST_LEVELS = 10_000
INSIDE, OUTSIDE = "-10", "-20"
"""The ids that represent a subgraph's inputs and its outputs."""

Node = dict[str, Any]


class Link(NamedTuple):
    """A link of the page."""

    origin: str
    origin_slot: int
    target: str
    target_slot: int


class Source(NamedTuple):
    """The output of a node that the server runs."""

    node: str
    slot: int


class Place(NamedTuple):
    """Where the page stores a widget's value: `container[key]`."""

    container: Any
    key: int | str

    @property
    def value(self) -> Any:
        """The stored value."""
        return self.container[self.key]


@dataclass(slots=True)
class Level:
    """The workflow itself, or one use of a subgraph."""

    nodes: dict[str, Node]
    links: dict[int, Link]
    definitions: Mapping[str, Workflow]
    definition: Workflow
    outer: tuple[Level, str] | None = None
    """The level around this one, and the id there of this level's node."""
    inner: dict[str, Level] = field(default_factory=dict[str, "Level"])

    def id_of(self, node: str) -> str:
        """Returns a node's id for the server, `12:3` inside node 12."""
        return node if self.outer is None else f"{self.outer[0].id_of(self.outer[1])}:{node}"

    def titles(self) -> tuple[str, ...]:
        """Returns the titles of the subgraphs around, the outermost first."""
        if self.outer is None:
            return ()
        level, node = self.outer
        return (*level.titles(), level.nodes[node].get("title") or str(self.definition.get("name", "")))

    def running(self) -> Iterator[tuple[Level, str, Node]]:
        """Yields the nodes the server is to run, with their levels."""
        for key, node in self.nodes.items():
            if node.get("mode") in (MUTED, BYPASSED) or node["type"] in VIRTUAL:
                continue
            if key in self.inner:
                yield from self.inner[key].running()
            else:
                yield self, key, node


def root(workflow: Workflow) -> Level:
    """Returns the outermost level of a workflow.

    Raises HyperAlignError on a subgraph that contains itself.
    """
    subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or []
    return _level(workflow, {str(one["id"]): one for one in subgraphs}, None, (), itertools.count(1))


def _level(
    graph: Workflow,
    definitions: Mapping[str, Workflow],
    outer: tuple[Level, str] | None,
    around: tuple[str, ...],
    levels: Iterator[int],
) -> Level:
    if next(levels) > MOST_LEVELS:  # a few definitions that use each other twice are millions of nodes
        raise HyperAlignError(
            f"The workflow uses subgraphs more than {MOST_LEVELS} times; remove some of their nodes."
        )
    nodes = {str(node["id"]): node for node in graph["nodes"]}
    level = Level(nodes, dict(map(_link, filter(None, graph.get("links") or []))), definitions, graph, outer)
    for key, node in nodes.items():
        kind = node["type"]
        if kind in around:
            raise HyperAlignError(
                f"The subgraph {shown(graph.get('name'))} contains itself; remove that node from it."
            )
        if kind in definitions:
            level.inner[key] = _level(definitions[kind], definitions, (level, key), (*around, kind), levels)
    return level


def _link(saved: Any) -> tuple[int, Link]:
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    try:
        number, origin, slot, target, end = (
            (saved[name] for name in names) if isinstance(saved, dict) else saved[:5]
        )
        link = int(number), Link(str(origin), int(slot), str(target), int(end))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise HyperAlignError(
            f"The workflow has the link {shown(saved)}; expected {', '.join(names)}. Save it again."
        ) from error
    if min(link[1].origin_slot, link[1].target_slot) < 0:
        raise HyperAlignError(
            f"The workflow has the link {shown(saved)}, which starts or ends at no slot. Save it again."
        )
    return link


Steps = frozenset[tuple[str, str, int]]


def source_of(
    level: Level, node: str, slot: int, passed: Steps = frozenset(), kind: str = ""
) -> Source | Place | None:
    """Returns what an input is linked to: an output, a widget of a primitive or a subgraph, or None.

    Args:
        level: of the node.
        node: its id there.
        slot: index of the input.
        passed: the inputs on the way so far.
        kind: the type that is looked for, where it is not the input's own.

    Raises:
        HyperAlignError: links that form a cycle, or a Get node without exactly one Set node of its name.
    """
    sockets = level.nodes[node].get("inputs") or []
    number = sockets[slot].get("link") if slot < len(sockets) else None
    link = None if number is None else level.links.get(int(number))
    if link is None:
        return None
    passed = _step(passed, level, node, slot)
    if link.origin != INSIDE:
        return _behind(level, link, kind or str(sockets[slot].get("type")), passed)
    return _outside(level, link.origin_slot, passed)


def _outside(level: Level, slot: int, passed: Steps) -> Source | Place | None:
    """Returns what an input of a subgraph is linked to, or the widget that it shows."""
    if level.outer is None:
        return None
    around, key = level.outer
    ends = level.definition.get("inputs") or []
    if not 0 <= slot < len(ends):
        return None
    name = ends[slot]["name"]
    instance = around.nodes[key]
    outside = next((i for i, s in enumerate(instance.get("inputs") or []) if s["name"] == name), None)
    if outside is not None and instance["inputs"][outside].get("link") is not None:
        return source_of(around, key, outside, passed)
    return promoted(level, instance).get(name)


def _behind(level: Level, link: Link, kind: str, passed: Steps) -> Source | Place | None:
    node = level.nodes.get(link.origin)
    if node is None:
        return None
    if node.get("mode") == BYPASSED:
        through = _bypass(node, link.origin_slot, kind)
        return None if through is None else source_of(level, link.origin, through, passed)
    if node["type"] in GETS:
        return source_of(*_set_node(level, link.origin), 0, passed, kind)
    if node["type"] in THROUGH:
        return source_of(level, link.origin, 0, passed, kind)
    if node["type"] == PRIMITIVE:
        return _first_widget(node)
    if link.origin not in level.inner:
        return Source(level.id_of(link.origin), link.origin_slot)
    inner = level.inner[link.origin]
    ends = (one for one in inner.links.values() if one.target == OUTSIDE)
    end = next((one for one in ends if one.target_slot == link.origin_slot), None)
    if end is None:
        return None
    passed = _step(passed, inner, OUTSIDE, end.target_slot)
    if end.origin == INSIDE:
        return _outside(inner, end.origin_slot, passed)
    return _behind(inner, end, kind, passed)


def _set_node(level: Level, get: str) -> tuple[Level, str]:
    """Returns the Set node with a Get node's name, in its level or the nearest one around, and that level."""
    name, number, around = _name(level.nodes[get]), level.id_of(get), (level, get)
    while around is not None:
        level = around[0]
        found = [key for key, node in level.nodes.items() if node["type"] in SETS and _name(node) == name]
        if len(found) > 1:
            ids = ", ".join(f"#{level.id_of(key)}" for key in found)
            raise HyperAlignError(
                f"The Set nodes {ids} are all named {shown(name)}; give each a name of its own."
            )
        if found:
            return level, found[0]
        around = level.outer
    raise HyperAlignError(
        f"The Get node #{number} reads {shown(name)}, and no Set node has that name; add one, or remove the "
        "Get node."
    )


def _name(node: Node) -> str:
    """Returns the name that a Set or Get node has in its only widget."""
    place = _first_widget(node)
    return "" if place is None else str(place.value)


def _first_widget(node: Node) -> Place | None:
    """Returns where a node keeps its first value; some packs save names."""
    values = node.get("widgets_values")
    if not values:
        return None
    return Place(values, next(iter(values)) if isinstance(values, dict) else 0)


def _bypass(node: Node, slot: int, kind: str) -> int | None:
    """Returns the input that a bypassed node passes on: that of the same slot, or the first of the type."""
    kinds = [str(socket.get("type")) for socket in node.get("inputs") or []]
    if kind in ("*", ""):
        return (slot if slot < len(kinds) else 0) if kinds else None
    outputs = node.get("outputs") or []
    leaving = str(outputs[slot].get("type")) if 0 <= slot < len(outputs) else kind
    fits = [_connects(one, leaving) and _connects(one, kind) for one in kinds]
    if slot < len(kinds) and fits[slot]:
        return slot
    return kinds.index(kind) if kind in kinds else next((i for i, fit in enumerate(fits) if fit), None)


def _connects(one: str, other: str) -> bool:
    """Whether the page would link two types: `*` fits all, lists fit if they share one."""
    left, right = set(one.lower().split(",")), set(other.lower().split(","))
    return "*" in left | right or bool(left & right)


def promoted(level: Level, instance: Node) -> dict[str, Place]:
    """Returns by name the widgets that a subgraph shows on its node and that store a value there."""
    values = instance.get("widgets_values")
    if not isinstance(values, list):
        return {}
    # A proxy with the node -1 is an input of the subgraph; any other only shows the widget inside.
    if proxies := (instance.get("properties") or {}).get("proxyWidgets"):
        names = [str(pair[1]) if len(pair) > 1 and str(pair[0]) == "-1" else None for pair in proxies]
    else:
        names = [
            one["name"]
            for slot, one in enumerate(level.definition.get("inputs") or [])
            if _shows(level, slot)
        ]
    pairs = zip(names, range(len(values)), strict=False)
    return {name: Place(values, at) for name, at in pairs if name and values[at] is not None}


def _shows(level: Level, slot: int) -> bool:
    """Whether an input of a subgraph leads to a widget inside."""
    ends = [link for link in level.links.values() if link.origin == INSIDE and link.origin_slot == slot]
    for link in ends:
        sockets = level.nodes[link.target].get("inputs") or [] if link.target in level.nodes else []
        if link.target_slot < len(sockets) and sockets[link.target_slot].get("widget"):
            return True
    return False


def _step(passed: Steps, level: Level, node: str, slot: int) -> Steps:
    step = (level.id_of(node), "input", slot)
    if step in passed:
        raise HyperAlignError(f"The links at node #{level.id_of(node)} form a cycle; remove one of them.")
    return passed | {step}
