"""What the string nodes of ComfyUI and of common packs make of their inputs.

Only nodes are here whose result is known from the graph: no wildcards, no files, no language models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .graph import Slot, Stop, TextGraph

HANDED_ON = {
    "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value",
    "PreviewAny": "source",
    "ShowText|pysssss": "text",
    "StringConstant": "string",
    "String Literal": "string",
    "String Literal (Image Saver)": "string",
    "CR Prompt Text": "prompt",
    "CR Text": "text",
    "ttN text": "text",
    "easy string": "value",
    "easy positive": "positive",
    "easy negative": "negative",
    "easy showAnything": "anything",
}
"""By class: the input that a node hands on as it is."""


LONGEST = 100_000
"""Letters of the longest text: graphs can double a text over and over."""


class Texts:
    """The texts of a graph's inputs, each computed once."""

    def __init__(self, graph: TextGraph) -> None:
        self._graph = graph
        self._made: dict[str, str] = {}
        self._begun: set[str] = set()

    def of(self, slot: Slot) -> str:
        """Returns the text of an input, through string nodes. Raises Stop where the graph lacks it."""
        value = self._graph.inputs(slot.node).get(slot.name)
        link = self._graph.link(value)
        if isinstance(value, str):
            return value
        if link is None:
            raise Stop(f"{self._graph.named(slot.node)} has no text in {slot.name}")
        source, _ = link
        if source not in self._graph.nodes:
            raise Stop(f"{self._graph.named(slot.node)} takes {slot.name} from #{source}, which is missing")
        if source not in self._made:
            self._made[source] = self._make(source)
        return self._made[source]

    def _make(self, node: str) -> str:
        if node in self._begun:
            raise Stop(f"the links at {self._graph.named(node)} form a cycle")
        self._begun.add(node)
        kind, inputs = self._graph.kind(node), Inputs(self._graph, node, self)
        if kind in HANDED_ON:
            return inputs.text(HANDED_ON[kind])
        if kind not in MADE:
            raise inputs.stop("what that node makes of its inputs is not known")
        text = MADE[kind](inputs)
        if len(text) > LONGEST:
            raise inputs.stop(f"its text has more than {LONGEST} letters")
        return text


class Inputs:
    """The inputs of a string node, with linked texts resolved."""

    def __init__(self, graph: TextGraph, node: str, texts: Texts) -> None:
        self._graph, self._node, self._texts = graph, node, texts

    @property
    def names(self) -> list[str]:
        """The names of all inputs."""
        return list(self._graph.inputs(self._node))

    def text(self, name: str, default: str | None = None) -> str:
        """Returns a text; `default` where the graph has no such input. Raises Stop."""
        if default is not None and name not in self._graph.inputs(self._node):
            return default
        return self._texts.of(Slot(self._node, name))

    def value(self, name: str) -> Any:
        """Returns a value. Raises Stop where it comes over a link or is missing."""
        inputs = self._graph.inputs(self._node)
        if name not in inputs or self._graph.link(inputs[name]):
            raise self.stop(f"the graph does not hold its {name}")
        return inputs[name]

    def stop(self, why: str) -> Stop:
        """Returns the error that this node is where the way back ends."""
        return Stop(f"it goes through {self._graph.named(self._node)}, and {why}")


def _concatenate(inputs: Inputs) -> str:
    return inputs.text("delimiter").join((inputs.text("string_a"), inputs.text("string_b")))


def _replace(inputs: Inputs) -> str:
    return inputs.text("string").replace(inputs.text("find"), inputs.text("replace"))


def _trim(inputs: Inputs) -> str:
    ways: dict[str, Callable[[str], str]] = {"Both": str.strip, "Left": str.lstrip, "Right": str.rstrip}
    return _chosen(inputs, ways)(inputs.text("string"))


def _convert_case(inputs: Inputs) -> str:
    ways: dict[str, Callable[[str], str]] = {
        "UPPERCASE": str.upper, "lowercase": str.lower, "Capitalize": str.capitalize, "Title Case": str.title,
    }  # fmt: skip
    return _chosen(inputs, ways)(inputs.text("string"))


def _chosen(inputs: Inputs, ways: Mapping[str, Callable[[str], str]]) -> Callable[[str], str]:
    mode = inputs.value("mode")
    if not isinstance(mode, str) or mode not in ways:
        raise inputs.stop(f"its mode {mode!r} is not known")
    return ways[mode]


def _substring(inputs: Inputs) -> str:
    start, end = inputs.value("start"), inputs.value("end")
    if not isinstance(start, int) or not isinstance(end, int):
        raise inputs.stop("its start or end is no number")
    return inputs.text("string")[start:end]


def _joined(first: str, second: str, between: str, default: str | None) -> Callable[[Inputs], str]:
    """Returns what joins two texts; `default` is the text of inputs that are not linked."""

    def join(inputs: Inputs) -> str:
        return inputs.text(between, default).join((inputs.text(first, default), inputs.text(second, default)))

    return join


def _join_many(inputs: Inputs) -> str:
    if inputs.value("return_list"):
        raise inputs.stop("it makes a list of prompts")
    count = inputs.value("inputcount")
    if not isinstance(count, int) or count > len(inputs.names):
        raise inputs.stop("its inputcount is not that of its texts")
    return inputs.text("delimiter").join(inputs.text(f"string_{number + 1}") for number in range(count))


def _was_concatenate(inputs: Inputs) -> str:
    delimiter, clean = inputs.text("delimiter"), inputs.value("clean_whitespace") == "true"
    texts = [inputs.text(name) for name in sorted(inputs.names) if name.startswith("text_")]
    texts = [text.strip() if clean else text for text in texts]
    return ("\n" if delimiter == "\\n" else delimiter).join(text for text in texts if text)


def _plain(name: str, signs: str, meaning: str) -> Callable[[Inputs], str]:
    """Returns what hands a text on that has none of the signs with a meaning of their own."""

    def hand_on(inputs: Inputs) -> str:
        text = inputs.text(name)
        if found := next((sign for sign in signs.split() if sign in text), None):
            raise inputs.stop(f"its text has {found!r}, which {meaning}")
        return text

    return hand_on


def _string_function(inputs: Inputs) -> str:
    action, texts = inputs.value("action"), [inputs.text(f"text_{letter}", "") for letter in "abc"]
    if inputs.value("tidy_tags") != "no":
        raise inputs.stop("its tidy_tags is on")
    if action == "append":
        return "".join(texts)
    if action != "replace" or texts[1].startswith("/"):
        raise inputs.stop("it replaces by a pattern")
    return texts[0].replace(texts[1], texts[2])


MADE: Mapping[str, Callable[[Inputs], str]] = {
    "StringConcatenate": _concatenate,
    "StringReplace": _replace,
    "StringTrim": _trim,
    "StringSubstring": _substring,
    "CaseConverter": _convert_case,
    "StringFunction|pysssss": _string_function,
    "JoinStrings": _joined("string1", "string2", "delimiter", None),
    "JoinStringMulti": _join_many,
    "StringConstantMultiline": _plain("string", "\n", "it may strip"),
    "CR Text Concatenate": _joined("text1", "text2", "separator", ""),
    "easy promptConcat": _joined("prompt1", "prompt2", "separator", ""),
    "Text Concatenate": _was_concatenate,
    "Text Multiline": _plain("text", "# [", "it may replace"),
    "ImpactWildcardProcessor": _plain("populated_text", "{ __", "it may replace"),
}
"""By class: what a node makes of its texts."""
