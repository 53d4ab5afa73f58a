"""The check of templates and blueprints: switched-off nodes, subgraphs, and what only the page has."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from scripts.check_workflows import problems

INFO: dict[str, Any] = {
    "Loader": {"input": {"required": {"file": [["a", "b"], {}]}}, "output": ["MODEL"]},
    "Tuner": {
        "input": {"required": {"model": ["MODEL"], "steps": ["INT", {"min": 1, "max": 9}]}},
        "output": ["MODEL"],
    },
    "Save": {"input": {"required": {"model": ["MODEL"]}}, "output": [], "output_node": True},
}


def socket(name: str, kind: str, link: int | None, widget: bool = False) -> dict[str, Any]:
    return {"name": name, "type": kind, "link": link} | ({"widget": {"name": name}} if widget else {})


def node(number: int, kind: str, values: list[Any], inputs: list[Any], *outputs: Any) -> dict[str, Any]:
    ends = [{"name": kind, "type": kind, "links": links} for kind, links in outputs]
    return {"id": number, "type": kind, "widgets_values": values, "inputs": inputs, "outputs": ends}


def template() -> dict[str, Any]:
    """A loader, a reroute, a tuner in a subgraph whose steps come from a primitive, and an output."""
    inner = node(
        1, "Tuner", [3], [socket("model", "MODEL", 1), socket("steps", "INT", 3, True)], ("MODEL", [2])
    )
    shown = node(
        3, "sub", [5], [socket("model", "MODEL", 1), socket("steps", "INT", 3, True)], ("MODEL", [2])
    )
    ends = [{"name": "model", "type": "MODEL"}, {"name": "steps", "type": "INT"}]
    sub = {
        "id": "sub", "name": "Tuned", "nodes": [inner], "inputs": ends,
        "outputs": [{"name": "MODEL", "type": "MODEL"}],
        "links": [[1, -10, 0, 1, 0, "MODEL"], [2, 1, 0, -20, 0, "MODEL"], [3, -10, 1, 1, 1, "INT"]],
    }  # fmt: skip
    return {
        "nodes": [
            node(1, "Loader", ["a"], [], ("MODEL", [0])),
            node(2, "Reroute", [], [socket("", "*", 0)], ("*", [1])),
            shown,
            node(4, "Save", [], [socket("model", "MODEL", 2)]),
            node(5, "PrimitiveNode", [7, "fixed"], [], ("INT", [3])),
            node(6, "MarkdownNote", ["read me"], []),
        ],
        "links": [
            [0, 1, 0, 2, 0, "*"], [1, 2, 0, 3, 0, "MODEL"], [2, 3, 0, 4, 0, "MODEL"], [3, 5, 0, 3, 1, "INT"],
        ],
        "definitions": {"subgraphs": [sub]},
    }  # fmt: skip


def test_reroutes_primitives_subgraphs_and_the_link_0_are_followed() -> None:
    assert list(problems(template(), INFO)) == []


def mute_an_output(workflow: dict[str, Any]) -> None:
    workflow["nodes"][3]["mode"] = 2


def bypass_inside_a_subgraph(workflow: dict[str, Any]) -> None:
    workflow["definitions"]["subgraphs"][0]["nodes"][0]["mode"] = 4


def use_another_pack_s_page(workflow: dict[str, Any]) -> None:
    workflow["nodes"][1]["type"] = "SetNode"


def give_a_primitive_too_much(workflow: dict[str, Any]) -> None:
    workflow["nodes"][4]["widgets_values"][0] = 99


def promote_a_value_that_is_no_number(workflow: dict[str, Any]) -> None:
    workflow["nodes"][2]["inputs"][1]["link"] = None
    workflow["nodes"][2]["widgets_values"] = ["five"]
    del workflow["nodes"][4], workflow["links"][3]


def leave_a_subgraph_s_input_open(workflow: dict[str, Any]) -> None:
    workflow["nodes"][2]["inputs"][0]["link"] = None
    workflow["nodes"][1]["outputs"][0]["links"] = []
    del workflow["links"][1]


def rename_a_subgraph_s_input(workflow: dict[str, Any]) -> None:
    workflow["definitions"]["subgraphs"][0]["inputs"][0]["name"] = "base"


def show_a_widget_of_no_node(workflow: dict[str, Any]) -> None:
    workflow["nodes"][2]["properties"] = {"proxyWidgets": [["8", "steps"]]}


FAULTS = {
    mute_an_output: "node 4 (Save) is switched off",
    bypass_inside_a_subgraph: "node 1 (Tuner) is switched off",
    use_another_pack_s_page: "node 2 is a SetNode, which this ComfyUI does not know",
    give_a_primitive_too_much: "node 3:1 (Tuner): 'steps' is 99; it must be 1 to 9",
    promote_a_value_that_is_no_number: "node 3:1 (Tuner): 'steps' is 'five', no INT",
    leave_a_subgraph_s_input_open: "model of 'Tuner' (#3:1) gets nothing",
    rename_a_subgraph_s_input: "node 3 (Tuned) lacks ('base', 'MODEL') of its subgraph's inputs",
    show_a_widget_of_no_node: "shows the widget 'steps' of node 8, which is not in it",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_named(fault: Any) -> None:
    workflow = copy.deepcopy(template())
    fault(workflow)
    assert any(FAULTS[fault] in each for each in problems(workflow, INFO)), list(problems(workflow, INFO))


def test_the_inputs_of_a_blueprint_are_open() -> None:
    blueprint = template()
    blueprint["nodes"], blueprint["links"] = [blueprint["nodes"][2]], []
    for end in blueprint["nodes"][0]["inputs"]:
        end["link"] = None
    blueprint["nodes"][0]["outputs"][0]["links"] = None
    assert list(problems(blueprint, INFO)) == []
