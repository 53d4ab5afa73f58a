"""Inputs that are linked: the host validates them with None, and the node checks the value that arrives."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

SOURCE = "HyperAlignTestSource"


class Anything(str):
    """A socket type that fits every other, as several packs have one."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class Source:
    RETURN_TYPES = (Anything("*"),)
    FUNCTION = "send"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}


@pytest.fixture(scope="module")
def node_classes(pack: ModuleType) -> Iterator[dict[str, Any]]:
    """The pack's nodes by their id, offered by the host together with a source of links."""
    import nodes

    extension = asyncio.run(pack.comfy_entrypoint())
    found = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    nodes.NODE_CLASS_MAPPINGS |= found | {SOURCE: Source}
    yield found
    del nodes.NODE_CLASS_MAPPINGS[SOURCE]


def queued(node: Any, **inputs: Any) -> dict[str, Any]:
    """A prompt of one node: widgets have their defaults, and sockets and inputs of None are linked."""
    values = {each.id: default_of(each) for each in node.GET_SCHEMA().inputs} | inputs
    linked = {name: ["0", 0] if value is None else value for name, value in values.items()}
    name = node.GET_SCHEMA().node_id
    return {"0": {"class_type": SOURCE, "inputs": {}}, "1": {"class_type": name, "inputs": linked}}


def default_of(widget: Any) -> Any:
    """The first value of a widget; None of a socket."""
    default = getattr(widget, "default", None)
    options = getattr(widget, "options", None)
    return options[0] if default is None and options else default


def errors(prompt: dict[str, Any]) -> list[Any]:
    import execution

    return asyncio.run(execution.validate_inputs("1", prompt, "1", {}))[1]


def test_a_link_to_any_input_is_no_problem_before_the_run(node_classes):
    for node in node_classes.values():
        names = [each.id for each in node.GET_SCHEMA().inputs]
        for linked in (*([name] for name in names), names):
            assert errors(queued(node, **dict.fromkeys(linked))) == [], (node, linked)


def test_a_linked_list_of_strengths_is_no_problem_before_the_run(node_classes):
    node = node_classes["HyperAlignStrength"]
    assert errors(queued(node, mode="list", values=None)) == []
    assert "expected numbers" in errors(queued(node, mode="list", values="1, x"))[0]["details"]


def test_a_linked_switch_may_turn_downloads_on(node_classes):
    node = node_classes["HyperAlignRewardLoader"]
    assert errors(queued(node, reward="hpsv2", download=None)) == []


@pytest.mark.parametrize("value", ["of tomorrow", None])
def test_a_wrong_choice_that_arrives_by_a_link_is_refused_in_a_sentence(node_classes, value):
    from comfy_api.latest import io

    seen = 0
    for node in node_classes.values():
        schema = node.GET_SCHEMA()
        for widget in schema.inputs:
            if not isinstance(widget, io.Combo.Input):
                continue
            inputs = {each.id: default_of(each) for each in schema.inputs} | {widget.id: value}
            if schema.is_input_list:
                inputs = {name: [given] for name, given in inputs.items()}
            with pytest.raises(ValueError, match=f"{value}.*(expected one of|the folders contain)") as caught:
                node.execute(**inputs)
            assert type(caught.value).__name__ == "HyperAlignError", (node, widget.id)
            assert widget.id in str(caught.value)
            seen += 1
    assert seen >= 18


@pytest.mark.parametrize("name", ["batch_size", "decode_size"])
def test_a_number_below_its_range_that_arrives_by_a_link_is_refused(node_classes, name):
    node = node_classes[{"batch_size": "HyperAlignTinyLatent", "decode_size": "HyperAlignGuidance"}[name]]
    inputs = {each.id: default_of(each) for each in node.GET_SCHEMA().inputs} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        node.execute(**inputs)


def test_a_linked_input_does_not_make_a_node_run_at_every_queue(node_classes, caplog):
    import execution
    from comfy_execution.graph import DynamicPrompt

    def fingerprint(prompt: dict[str, Any]) -> Any:
        cache = execution.IsChangedCache("1", DynamicPrompt(prompt), None)  # type: ignore[arg-type]
        return asyncio.run(cache.get("1"))

    for node in node_classes.values():
        for name in [each.id for each in node.GET_SCHEMA().inputs]:
            found = [fingerprint(queued(node, **{name: None})) for _ in range(2)]
            assert found[0] == found[1], (node, name)  # NaN differs from itself
            assert not (isinstance(found[0], float) and math.isnan(found[0]))
            json.dumps(found)  # the host saves it with the prompt in images
    assert "WARNING" not in caplog.text
