"""A graph as the server runs it, and what is declared of its nodes' outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeGuard, cast

from ....errors import HyperAlignError

Side = Literal["positive", "negative"]
Nodes = Mapping[str, Mapping[str, Any]]
"""ComfyUI's `prompt`: nodes by their ids, each with `class_type` and `inputs`."""


class Output(NamedTuple):
    """An output as its node declares it."""

    kind: str
    """Such as CONDITIONING; of a node that takes any type, `*`."""
    name: str


class Slot(NamedTuple):
    """An input of a node."""

    node: str
    name: str


class Stop(HyperAlignError):
    """A graph does not say, or not unambiguously, which text was encoded; names the node that is why."""


@dataclass(frozen=True, slots=True)
class TextGraph:
    """The nodes of a graph by their ids, and their declared outputs where these are known."""

    nodes: Nodes
    outputs: Mapping[str, list[Output]] = field(default_factory=dict[str, "list[Output]"])

    @staticmethod
    def of(prompt: Mapping[str, Any], outputs: Mapping[str, list[Output]]) -> TextGraph:
        """Returns the graph of a `prompt`, without whatever in it is no node."""
        return TextGraph({key: node for key, node in prompt.items() if _is_node(node)}, outputs)

    def kind(self, node: str) -> str:
        """Returns a node's class."""
        return str(self.nodes[node].get("class_type"))

    def inputs(self, node: str) -> Mapping[str, Any]:
        """Returns a node's values and links by the inputs' names."""
        return self.nodes[node]["inputs"]

    def link(self, value: Any) -> tuple[str, int] | None:
        """Returns the node and the output that a value links to, None for a value that is no link."""
        if not is_link(value):
            return None
        return str(value[0]), value[1]

    def output(self, node: str, slot: int) -> Output | None:
        """Returns what is declared of an output, None if nothing is."""
        declared = self.outputs.get(node, [])
        return declared[slot] if 0 <= slot < len(declared) else None

    def readers(self) -> Mapping[str, list[Slot]]:
        """Returns by node the inputs that its outputs are linked to."""
        found: dict[str, list[Slot]] = {key: [] for key in self.nodes}
        for key in self.nodes:
            for name, value in self.inputs(key).items():
                if (link := self.link(value)) and link[0] in found:
                    found[link[0]].append(Slot(key, name))
        return found

    def upstream(self, node: str) -> Iterator[str]:
        """Yields a node and every node it depends on."""
        waiting, seen = [node], {node}
        while waiting:
            current = waiting.pop()
            yield current
            for value in self.inputs(current).values():
                link = self.link(value)
                if link and link[0] in self.nodes and link[0] not in seen:
                    seen.add(link[0])
                    waiting.append(link[0])

    def named(self, node: str) -> str:
        """Returns how messages name a node: its class and its id."""
        return f"{self.kind(node)} (#{node})"


def is_link(value: Any) -> TypeGuard[list[Any]]:
    """Whether an input's value is another node's output."""
    if not isinstance(value, list) or len(cast("list[Any]", value)) != 2:
        return False
    node, slot = cast("list[Any]", value)
    return isinstance(node, str | int) and isinstance(slot, int) and not isinstance(slot, bool)


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(cast("dict[str, Any]", node).get("inputs"), dict)
