"""The positive prompt of a graph: one text, or why there is not exactly one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .carriers import CARRIERS
from .graph import Output, Slot, Stop, TextGraph
from .strings import Texts
from .walk import Walk, declared_texts


@dataclass(frozen=True, slots=True)
class Found:
    """A prompt, or why there is none."""

    text: str | None
    why: str = ""
    """A clause about the prompt that names the node where the way back to it ended."""


def positive_prompt(prompt: Mapping[str, Any], outputs: Mapping[str, list[Output]] | None = None) -> Found:
    """Returns the text from which the samplers' positive conditioning was encoded.

    Args:
        prompt: the graph as the server ran it.
        outputs: the declared outputs by node, where they are known.
    """
    graph = TextGraph.of(prompt, outputs or {})
    try:
        slots = Walk(graph).inputs("positive") or _alone(graph)
        texts = _texts(graph, slots)
    except RecursionError:
        return Found(None, "its graph has too many nodes in a row")
    except Stop as stop:
        return Found(None, str(stop))
    texts = {text: slot for text, slot in texts.items() if text} or texts
    if not texts:
        return Found(None, "no node of its graph samples with a text")
    if len(texts) > 1:
        named = " and ".join(f"{slot.name} of {graph.named(slot.node)}" for slot in texts.values())
        return Found(None, f"it could be the text in {named}")
    return Found(next(iter(texts)))


def _texts(graph: TextGraph, slots: Sequence[Slot]) -> dict[str, Slot]:
    """Returns the different texts, with one of their inputs. Raises Stop."""
    texts, found = Texts(graph), dict[str, Slot]()
    for slot in slots:
        text, carrier = texts.of(slot).strip(), CARRIERS.get(graph.kind(slot.node))
        if carrier and (sign := next((each for each in carrier.signs if each in text), None)):
            raise Stop(f"{graph.named(slot.node)} replaces the {sign!r} in its text")
        found.setdefault(text, slot)
    return found


def _alone(graph: TextGraph) -> list[Slot]:
    """Returns the texts of an encoder if the graph has nothing else."""
    for node in graph.nodes:
        texts = declared_texts(graph, node)
        if texts and set(graph.upstream(node)) == set(graph.nodes):
            return [Slot(node, name) for name in texts]
    return []
