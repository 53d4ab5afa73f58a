"""What muted and bypassed nodes leave out of a run, said before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import HyperAlignError, shown
from .files import ObjectInfo, Prompt
from .levels import BYPASSED, MUTED, Level, Node, Source, source_of

WORDS = {MUTED: "muted", BYPASSED: "bypassed"}


@dataclass(frozen=True, slots=True)
class Off:
    """A node, or the use of a subgraph, that does not run."""

    level: Level
    key: str
    node: Node

    @property
    def number(self) -> str:
        """Its id for the server."""
        return self.level.id_of(self.key)

    @property
    def sentence(self) -> str:
        """What it is, without a full stop."""
        inner = self.level.inner.get(self.key)
        name = self.node.get("title") or (inner and inner.definition.get("name")) or self.node["type"]
        return f"{shown(str(name))} (#{self.number}) is {WORDS[self.node['mode']]}"

    def has_output(self, info: ObjectInfo) -> bool:
        """Whether it, or a node in it, would save or show something."""
        inner = self.level.inner.get(self.key)
        if inner is not None:
            return any(_is_output(node, info) for _, _, node in inner.running())
        return _is_output(self.node, info)


def notes(root: Level, prompt: Prompt, info: ObjectInfo) -> tuple[str, ...]:
    """Returns a sentence for each output that is switched off and each required input that is left empty.

    Raises HyperAlignError when all outputs are switched off.
    """
    off = list(_switched_off(root))
    outputs = [one.sentence for one in off if one.has_output(info)]
    if outputs and not any(info[node["class_type"]].get("output_node") for node in prompt.values()):
        raise HyperAlignError(
            f"The workflow has nothing to run: {'; '.join(outputs)}. Switch one on in ComfyUI's page and "
            "save the workflow again."
        )
    return *(f"{sentence} and does not run." for sentence in outputs), *_empty(root, off, prompt, info)


def _switched_off(level: Level) -> Iterator[Off]:
    for key, node in level.nodes.items():
        if node.get("mode") in WORDS:
            yield Off(level, key, node)
        elif key in level.inner:
            yield from _switched_off(level.inner[key])


def _empty(root: Level, off: list[Off], prompt: Prompt, info: ObjectInfo) -> Iterator[str]:
    for level, key, node in root.running():
        number = level.id_of(key)
        if number not in prompt:
            continue
        required = info[node["type"]]["input"].get("required", {})
        for slot, socket in enumerate(node.get("inputs") or []):
            name = socket["name"]
            if socket.get("link") is None or name not in required or name in prompt[number]["inputs"]:
                continue
            cause = _cause(level, key, slot, off)
            title = shown(prompt[number]["_meta"]["title"])
            why = cause.sentence if cause else "its link ends at nothing"
            yield f"{name} of {title} (#{number}) gets nothing: {why}."


def _cause(level: Level, key: str, slot: int, off: list[Off]) -> Off | None:
    """Returns the switched-off node at the other end of a link, or the one right behind the input."""
    link = level.links.get(level.nodes[key]["inputs"][slot]["link"])
    number = None if link is None else level.id_of(link.origin)
    source = source_of(level, key, slot)
    if isinstance(source, Source):
        number = source.node
    return next((one for one in off if number and f"{number}:".startswith(f"{one.number}:")), None)


def _is_output(node: Node, info: ObjectInfo) -> bool:
    return bool(info.get(node["type"], {}).get("output_node"))
