"""Follows the conditioning of a graph's samplers back to the inputs that hold its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .carriers import CARRIERS, ERASES, GUIDERS, HANDED_ON, SWITCHES, Carried
from .graph import Side, Slot, Stop, TextGraph
from .strings import HANDED_ON as STRINGS_HANDED_ON
from .strings import MADE

BUNDLES = ("pipe", "basic_pipe", "detailer_pipe", "base_ctx")
"""Inputs with positive and negative conditioning in one."""
TEXTS = (
    "text", "prompt", "text_g", "text_l", "t5xxl", "clip_l", "clip_g", "llama", "bert", "mt5xl",
    "user_prompt", "positive_prompt",
)  # fmt: skip
"""Inputs for text of ComfyUI's text encoders."""
Output = tuple[str, int, Side]
"""A node's output, and the side that is meant where it carries both."""


def declared_texts(graph: TextGraph, node: str) -> list[str]:
    """Returns the inputs for text of a node whose class says that it encodes text; none of others."""
    if "TextEncode" not in graph.kind(node):
        return []
    return [name for name in TEXTS if name in graph.inputs(node)]


class Walk:
    """The way from a graph's samplers back to its texts.

    Args:
        graph: the graph.
        texts: returns the inputs for text of a node that encodes text, and none for others.
    """

    def __init__(
        self, graph: TextGraph, texts: Callable[[TextGraph, str], list[str]] = declared_texts
    ) -> None:
        self._graph = graph
        self._texts = texts
        self._readers = graph.readers()
        self._found: dict[Output, list[Slot]] = {}
        self._begun: set[Output] = set()

    def inputs(self, side: Side) -> list[Slot]:
        """Returns the inputs that hold the texts of one side, in the samplers' order; none without a sampler.

        Raises:
            Stop: a node on the way does not say where its conditioning comes from, or a positive text is
                another sampler's negative one.
        """
        found = [slot for node in self._samplers() for slot in self._of_sampler(node, side)]
        if side == "positive":
            self._check(set(found))
        return list(dict.fromkeys(found))

    def _samplers(self) -> list[str]:
        """Returns the nodes that take conditioning, and do more than to hand it on."""
        return [node for node in self._graph.nodes if self._uses_conditioning(node)]

    def _check(self, found: set[Slot]) -> None:
        """Raises Stop if some text that was found is the negative one of any sampler."""
        for node in self._samplers():
            try:
                negative = set(self._of_sampler(node, "negative"))
                same = negative == set(self._of_sampler(node, "positive"))
            except Stop:
                continue
            if not same and found & negative:
                raise Stop(f"it is also the negative prompt of {self._graph.named(node)}")

    def _uses_conditioning(self, node: str) -> bool:
        kind = self._graph.kind(node)
        takes = [name for name in self._graph.inputs(node) if self._is_conditioning(node, name)]
        if carrier := CARRIERS.get(kind):
            return carrier.samples and bool(takes)
        if not takes or kind in SWITCHES or kind in HANDED_ON:
            return False
        if not {"positive", *BUNDLES} & set(takes):
            declared = [output.kind for output in self._graph.outputs.get(node, [])]
            return kind in GUIDERS or (bool(declared) and not {"CONDITIONING", "*", ""} & set(declared))
        readers = self._readers[node]
        return not readers or not all(self._is_conditioning(*reader) for reader in readers)

    def _is_conditioning(self, node: str, name: str) -> bool:
        """Whether a linked input takes conditioning or a bundle, by its type or else by its name."""
        link = self._graph.link(self._graph.inputs(node).get(name))
        if link is None or link[0] not in self._graph.nodes or self._is_string(link):
            return False
        if name in BUNDLES or name.startswith("ctx_") or name in SWITCHES.get(self._graph.kind(node), ()):
            return True
        output = self._graph.output(*link)
        if output is not None and output.kind not in ("*", ""):
            return output.kind == "CONDITIONING"
        return name in ("positive", "negative", "pos", "neg") or "cond" in name.lower()

    def _of_sampler(self, node: str, side: Side) -> Iterator[Slot]:
        inputs, carrier = self._graph.inputs(node), CARRIERS.get(self._graph.kind(node))
        if carrier is not None:
            yield from self._carried(node, side)
            return
        if side in inputs:
            yield from self._above(node, side, side)
            return
        names = [name for name in inputs if self._is_conditioning(node, name)]
        if bundle := next((name for name in names if name in BUNDLES), None):
            yield from self._above(node, bundle, side)
        elif side == "positive":
            for name in names:
                if _side_of(name) != "negative":
                    yield from self._above(node, name, side)

    def _above(self, node: str, name: str, side: Side) -> Iterator[Slot]:
        """Yields the inputs that hold the text of what an input takes."""
        value = self._graph.inputs(node).get(name)
        link = self._graph.link(value)
        if link is None:
            if not isinstance(value, str):
                raise Stop(f"{self._graph.named(node)} has nothing linked to {name}")
            yield self._text(node, name)
        elif link[0] not in self._graph.nodes:
            raise Stop(f"{self._graph.named(node)} takes {name} from #{link[0]}, which the graph lacks")
        elif self._is_string(link):
            yield self._text(node, name)
        else:
            yield from self._behind(*link, side)

    def _behind(self, node: str, slot: int, side: Side) -> list[Slot]:
        """Returns the inputs that hold the text of an output."""
        output = node, slot, side
        if output not in self._found:
            if output in self._begun:
                raise Stop(f"the links at {self._graph.named(node)} form a cycle")
            self._begun.add(output)
            try:
                self._found[output] = list(dict.fromkeys(self._through(*output)))
            finally:
                self._begun.remove(output)
        return self._found[output]

    def _text(self, node: str, name: str) -> Slot:
        if self._graph.kind(node) not in CARRIERS and name not in self._texts(self._graph, node):
            raise self._stop(node, "what that node makes of its text is not known")
        return Slot(node, name)

    def _is_string(self, link: tuple[str, int]) -> bool:
        output, kind = self._graph.output(*link), self._graph.kind(link[0])
        return kind in STRINGS_HANDED_ON or kind in MADE or (output is not None and output.kind == "STRING")

    def _through(self, node: str, slot: int, side: Side) -> Iterator[Slot]:
        """Yields the inputs that hold the text of an output, through one node."""
        kind, inputs = self._graph.kind(node), self._graph.inputs(node)
        if why := ERASES.get(kind):
            raise self._stop(node, why)
        if kind in CARRIERS or ("positive" in inputs and "negative" in inputs):
            carried = self._carried_by(node, slot)
            if carried not in (side, "both"):
                raise self._stop(node, f"its {carried} output is taken as the {side} one")
            yield from self._carried(node, side)
        elif kind in SWITCHES:
            name = next((each for each in SWITCHES[kind] if self._graph.link(inputs.get(each))), None)
            if name is None:
                raise self._stop(node, "nothing is linked to it")
            yield from self._above(node, name, side)
        elif kind in HANDED_ON:
            for name in HANDED_ON[kind]:
                yield from self._above(node, name, side)
        else:
            yield from self._encoded(node, side)

    def _encoded(self, node: str, side: Side) -> Iterator[Slot]:
        """Yields the texts of an encoder, or those behind a node that hands on what it takes."""
        names = [name for name in self._graph.inputs(node) if self._is_conditioning(node, name)]
        texts = self._texts(self._graph, node)
        if texts and names:
            raise self._stop(node, f"it has a text of its own besides {names[0]}")
        if not texts and not names:
            raise self._stop(node, "where that node has its text from is not known")
        if any(_side_of(name) == "negative" for name in names):
            raise self._stop(node, "which of its outputs is the positive one is not known")
        yield from (Slot(node, name) for name in texts)
        for name in names:
            yield from self._above(node, name, side)

    def _carried_by(self, node: str, slot: int) -> Carried:
        """Returns what an output of a carrier carries. Raises Stop where that is not known."""
        if carrier := CARRIERS.get(self._graph.kind(node)):
            carried = carrier.outputs.get(slot)
        else:
            carried = self._declared(node, slot)
        if carried is None:
            raise self._stop(node, "which of its outputs is the positive one is not known")
        return carried

    def _declared(self, node: str, slot: int) -> Carried | None:
        """Returns the side of an output by its name, or its order where two have only a type."""
        output = self._graph.output(node, slot)
        if output is None or output.kind != "CONDITIONING":
            return None
        if side := _side_of(output.name):
            return side
        pair = [at for at, each in enumerate(self._graph.outputs[node]) if each.kind == "CONDITIONING"]
        named = any(_side_of(self._graph.outputs[node][at].name) for at in pair)
        if named or len(pair) != 2:
            return None
        return "positive" if slot == pair[0] else "negative"

    def _carried(self, node: str, side: Side) -> Iterator[Slot]:
        """Yields the inputs behind one side of a carrier: its own, or else those of its bundle."""
        kind, inputs = self._graph.kind(node), self._graph.inputs(node)
        carrier = CARRIERS.get(kind)
        own = carrier.inputs[side] if carrier else side
        value: Any = inputs.get(own)
        if value is not None and not (value == "" and carrier and carrier.bundles):
            yield from self._above(node, own, side)
            return
        bundles = carrier.bundles if carrier else ()
        bundle = next((name for name in bundles if self._graph.link(inputs.get(name))), None)
        if bundle is None:
            raise self._stop(node, f"nothing is linked to its {own}")
        yield from self._above(node, bundle, side)

    def _stop(self, node: str, why: str) -> Stop:
        return Stop(f"it goes through {self._graph.named(node)}, and {why}")


def _side_of(name: str) -> Side | None:
    """Returns the side in the name of an output or input, None without one."""
    lowered = name.lower()
    if lowered.startswith("pos") or lowered.endswith("+"):
        return "positive"
    return "negative" if lowered.startswith("neg") or lowered.endswith("-") else None
