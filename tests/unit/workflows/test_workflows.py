"""Workflows from the page's format to the API's: what a ComfyUI's page would queue."""

from __future__ import annotations

from typing import Any

import pytest
from workflow_files import INFO, SIMPLE, around, instance, node, sampler, socket, workflow

from hyperalign.cli.sample.convert import read, to_prompt, upstream
from hyperalign.errors import HyperAlignError


def test_widgets_links_and_notes():
    prompt = to_prompt(SIMPLE, INFO)
    assert set(prompt) == {"4", "7"}
    assert prompt["7"]["inputs"] == {
        "seed": 5, "steps": 25, "name": "heun", "variant": "auto", "denoise": 0.5, "model": ["4", 0],
    }  # fmt: skip
    assert list(upstream(prompt, "7")) == ["7", "4"]


def test_the_page_may_keep_values_by_name():
    named = {"seed": 3, "steps": 2, "name": "euler", "variant": "S", "denoise": 1.0, "preview": None}
    graph = workflow([node(7, "Sampler", named)])
    assert to_prompt(graph, INFO)["7"]["inputs"] == {k: v for k, v in named.items() if k != "preview"}


def test_changes_go_to_a_copy_in_both_formats():
    graph = read(SIMPLE, INFO)
    changed = graph.with_values({("7", "steps"): 3, ("4", "file"): "b"})
    assert (changed.prompt["7"]["inputs"]["steps"], changed.prompt["4"]["inputs"]["file"]) == (3, "b")
    assert changed.workflow is not None
    assert to_prompt(changed.workflow, INFO) == changed.prompt
    assert graph.prompt["7"]["inputs"]["steps"] == 25
    assert SIMPLE["nodes"][1]["widgets_values"][2] == 25


def test_an_upload_button_stands_behind_the_widgets():
    prompt = to_prompt(workflow([node(1, "Image", ("x.png", 9, "image"))]), INFO)
    assert prompt["1"]["inputs"] == {"image": "x.png", "size": 9}


def test_a_dynamic_choice_brings_its_own_widgets():
    ramp = to_prompt(workflow([node(1, "Chooser", ("ramp", 0.2, 0.8, 4))]), INFO)["1"]["inputs"]
    assert ramp == {"mode": "ramp", "mode.start": 0.2, "mode.end": 0.8, "after": 4}
    assert to_prompt(workflow([node(1, "Chooser", ("plain", 4))]), INFO)["1"]["inputs"] == {
        "mode": "plain",
        "after": 4,
    }


def test_a_packs_own_widgets_are_told_by_what_was_saved_and_lists_are_no_links():
    graph = workflow(
        [
            node(
                1, "Painter", ("red", [[0, 1], [1, 0]]),
                [socket("colour", "COLOURS", widget=True), socket("curve", "CURVE", widget=True)],
            )
        ]
    )  # fmt: skip
    assert to_prompt(graph, INFO)["1"]["inputs"] == {
        "colour": "red",
        "curve": {"__value__": [[0, 1], [1, 0]]},
    }


def test_reroutes_and_primitives_vanish():
    graph = workflow(
        [
            node(4, "Loader", ("a",)),
            node(5, "Reroute", (), [socket("", "*", 1)], outputs=[{"type": "MODEL"}]),
            node(6, "PrimitiveNode", (77, "randomize"), outputs=[{"type": "INT"}]),
            sampler(sockets=[socket("seed", "INT", 3, widget=True)], link=2),
        ],
        [1, 4, 0, 5, 0, "*"], [2, 5, 0, 7, 0, "MODEL"], [3, 6, 0, 7, 2, "INT"],
    )  # fmt: skip
    prompt = to_prompt(graph, INFO)
    assert set(prompt) == {"4", "7"}
    assert (prompt["7"]["inputs"]["model"], prompt["7"]["inputs"]["seed"]) == (["4", 0], 77)
    changed = read(graph, INFO).with_values({("7", "seed"): 1})
    assert changed.workflow is not None
    assert changed.workflow["nodes"][2]["widgets_values"] == [1, "randomize"]


def test_bypassed_nodes_pass_on_what_has_their_type():
    graph = workflow(
        [
            node(4, "Loader", ("a",)),
            node(5, "Tuner", (1,), [socket("amount", "FLOAT"), socket("model", "MODEL", 1)], mode=4),
            sampler(link=2),
        ],
        [1, 4, 0, 5, 1, "MODEL"], [2, 5, 0, 7, 0, "MODEL"],
    )  # fmt: skip
    prompt = to_prompt(graph, INFO)
    assert set(prompt) == {"4", "7"}
    assert prompt["7"]["inputs"]["model"] == ["4", 0]


def test_muted_nodes_give_nothing():
    nodes = [node(4, "Loader", ("a",), mode=2), sampler()]
    prompt = to_prompt(workflow(nodes, [1, 4, 0, 7, 0, "MODEL"]), INFO)
    assert set(prompt) == {"7"}
    assert "model" not in prompt["7"]["inputs"]


def test_subgraphs_are_opened_and_their_widgets_win():
    graph = read(around(instance(12)), INFO)
    assert set(graph.prompt) == {"4", "12:1", "12:2", "9"}
    assert graph.prompt["12:1"]["inputs"]["model"] == ["4", 0]
    assert graph.prompt["12:2"]["inputs"]["steps"] == 12
    assert graph.prompt["9"]["inputs"]["images"] == ["12:2", 0]
    assert graph.titles["12:2"] == ("Aligned", "Inner")
    changed = graph.with_values({("12:2", "steps"): 3})
    assert changed.workflow is not None
    assert changed.workflow["nodes"][1]["widgets_values"] == [3]


def test_a_subgraph_without_values_of_its_own_keeps_those_inside():
    assert to_prompt(around(instance(12, [])), INFO)["12:2"]["inputs"]["steps"] == 25
    proxies = {"proxyWidgets": [["2", "denoise"], ["-1", "steps"]]}
    shown = instance(12, [0.1, 6], properties=proxies)
    assert to_prompt(around(shown), INFO)["12:2"]["inputs"]["steps"] == 6


def test_two_uses_of_a_subgraph_are_two_sets_of_nodes():
    graph = read(around(instance(12), instance(13, [4], None)), INFO)
    assert graph.prompt["13:2"]["inputs"]["steps"] == 4
    assert "model" not in graph.prompt["13:1"]["inputs"]
    shared = graph.with_values({("12:1", "amount"): 0.9})
    assert shared.prompt["13:1"]["inputs"]["amount"] == 0.5
    assert shared.workflow is None, "the page's format cannot say this"
    assert graph.with_values({("12:2", "steps"): 1}).workflow is not None


@pytest.mark.parametrize("mode", [2, 4])
def test_what_is_inside_a_switched_off_subgraph_does_not_run(mode):
    prompt = to_prompt(around(instance(12, mode=mode)), INFO)
    assert set(prompt) == {"4", "9"}
    assert "images" not in prompt["9"]["inputs"]


def test_subgraphs_in_subgraphs():
    inside = node(5, "sub", (8,), [socket("model", "MODEL", 1), socket("steps", "INT", widget=True)])
    outer = {
        "id": "outer", "name": "Outer", "inputs": [{"name": "model"}], "outputs": [{"name": "LATENT"}],
        "nodes": [inside],
        "links": [[1, -10, 0, 5, 0, "MODEL"], [2, 5, 0, -20, 0, "LATENT"]],
    }  # fmt: skip
    content = around(instance(12) | {"type": "outer", "widgets_values": []})
    content["definitions"]["subgraphs"].append(outer)
    prompt = to_prompt(content, INFO)
    assert prompt["9"]["inputs"]["images"] == ["12:5:2", 0]
    assert prompt["12:5:1"]["inputs"]["model"] == ["4", 0]
    assert prompt["12:5:2"]["inputs"]["steps"] == 8


def test_a_subgraph_may_hand_its_input_to_its_output_and_links_may_have_the_number_0():
    outer = {
        "id": "outer", "name": "Outer", "inputs": [{"name": "model"}], "outputs": [{"name": "MODEL"}],
        "nodes": [], "links": [[0, -10, 0, -20, 0, "MODEL"]],
    }  # fmt: skip
    instance = node(5, "outer", (), [socket("model", "MODEL", 0)], outputs=[{"type": "MODEL"}])
    content = workflow(
        [node(4, "Loader", ("a",)), instance, sampler()],
        [0, 4, 0, 5, 0, "MODEL"], [1, 5, 0, 7, 0, "MODEL"],
        definitions={"subgraphs": [outer]},
    )  # fmt: skip
    assert to_prompt(content, INFO)["7"]["inputs"]["model"] == ["4", 0]


def test_a_widget_that_subgraphs_hand_on_has_the_value_of_the_outermost():
    inside = node(
        5, "sub", (8,), [socket("model", "MODEL", 1), socket("steps", "INT", 3, widget=True)],
    )  # fmt: skip
    outer = {
        "id": "outer", "name": "Outer", "inputs": [{"name": "model"}, {"name": "steps"}],
        "outputs": [{"name": "LATENT"}], "nodes": [inside],
        "links": [[1, -10, 0, 5, 0, "MODEL"], [2, 5, 0, -20, 0, "LATENT"], [3, -10, 1, 5, 1, "INT"]],
    }  # fmt: skip
    content = around(instance(12, (3,)) | {"type": "outer"})
    content["definitions"]["subgraphs"].append(outer)
    graph = read(content, INFO)
    assert graph.prompt["12:5:2"]["inputs"]["steps"] == 3
    changed = graph.with_values({("12:5:2", "steps"): 4})
    assert changed.workflow is not None
    assert changed.workflow["nodes"][1]["widgets_values"] == [4]
    assert to_prompt(changed.workflow, INFO) == changed.prompt


def test_bypassed_nodes_inside_a_subgraph_link_its_input_to_its_output():
    tuners = [
        node(1, "Tuner", (0.5,), [socket("model", "MODEL", 1)], mode=4),
        node(2, "Tuner", (0.5,), [socket("model", "MODEL", 2)]),
        node(3, "Tuner", (0.5,), [socket("model", "MODEL", 3)], mode=4),
    ]
    links = [[1, -10, 0, 1, 0, "MODEL"], [2, 1, 0, 2, 0, "MODEL"], [3, 2, 0, 3, 0, "MODEL"]]
    sub = {
        "id": "sub", "name": "S", "inputs": [{"name": "model"}], "outputs": [{"name": "MODEL"}],
        "nodes": tuners, "links": [*links, [4, 3, 0, -20, 0, "MODEL"]],
    }  # fmt: skip
    shown = node(12, "sub", (), [socket("model", "MODEL", 1)], outputs=[{"type": "MODEL"}])
    nodes = [node(4, "Loader", ("a",)), shown, sampler(link=2)]
    content = workflow(
        nodes, [1, 4, 0, 12, 0, "MODEL"], [2, 12, 0, 7, 0, "MODEL"], definitions={"subgraphs": [sub]}
    )
    prompt = to_prompt(content, INFO)
    assert set(prompt) == {"4", "12:2", "7"}
    assert (prompt["7"]["inputs"]["model"], prompt["12:2"]["inputs"]["model"]) == (["12:2", 0], ["4", 0])
    tuners[1]["mode"] = 4
    assert to_prompt(content, INFO)["7"]["inputs"]["model"] == ["4", 0]


def test_a_primitive_s_value_goes_through_reroutes_into_subgraphs():
    content = around(instance(12, (5,)))
    content["nodes"] += [
        node(20, "PrimitiveNode", (30, "fixed"), outputs=[{"type": "INT"}]),
        node(21, "Reroute", (), [socket("", "*", 5)], outputs=[{"type": "INT"}]),
    ]
    content["nodes"][1]["inputs"][1]["link"] = 6
    content["links"] += [[5, 20, 0, 21, 0, "INT"], [6, 21, 0, 12, 1, "INT"]]
    graph = read(content, INFO)
    assert graph.prompt["12:2"]["inputs"]["steps"] == 30
    changed = graph.with_values({("12:2", "steps"): 31})
    assert changed.workflow is not None
    assert changed.workflow["nodes"][3]["widgets_values"] == [31, "fixed"]


def save(number: int, link: int | None, **more: Any) -> dict[str, Any]:
    return node(number, "Save", ("out",), [socket("images", "LATENT", link)], **more)


@pytest.mark.parametrize(("mode", "word"), [(2, "muted"), (4, "bypassed")])
def test_a_switched_off_output_is_reported_and_alone_refused(mode, word):
    nodes = [node(4, "Loader", ("a",)), sampler(), save(8, 2), save(9, 3, mode=mode, title="Other")]
    links = [1, 4, 0, 7, 0, "MODEL"], [2, 7, 0, 8, 0, "LATENT"], [3, 7, 0, 9, 0, "LATENT"]
    assert read(workflow(nodes, *links), INFO).notes == (f"'Other' (#9) is {word} and does not run.",)
    nodes[2]["mode"] = mode
    said = rf"nothing to run: 'Save' \(#8\) is {word}; 'Other' \(#9\) is {word}. Switch one on"
    with pytest.raises(HyperAlignError, match=said):
        read(workflow(nodes, *links), INFO)


def test_a_switched_off_subgraph_with_an_output_inside_is_reported():
    sub = {"id": "saver", "name": "Saver", "nodes": [save(1, None)], "links": []}
    nodes = [node(4, "Loader", ("a",)), sampler(), save(8, 2), node(9, "saver", mode=2)]
    links = [1, 4, 0, 7, 0, "MODEL"], [2, 7, 0, 8, 0, "LATENT"]
    content = workflow(nodes, *links, definitions={"subgraphs": [sub]})
    assert read(content, INFO).notes == ("'Saver' (#9) is muted and does not run.",)


@pytest.mark.parametrize(("mode", "word"), [(2, "muted"), (4, "bypassed")])
def test_a_required_input_that_a_switched_off_node_leaves_empty_is_reported(mode, word):
    nodes = [node(4, "Loader", ("a",), mode=mode), sampler(), save(8, 2)]
    graph = read(workflow(nodes, [1, 4, 0, 7, 0, "MODEL"], [2, 7, 0, 8, 0, "LATENT"]), INFO)
    assert graph.notes == (f"model of 'Sampler' (#7) gets nothing: 'Loader' (#4) is {word}.",)
    assert graph.with_values({("7", "steps"): 3}).notes == graph.notes


def test_an_input_that_leads_to_an_open_end_of_a_subgraph_is_reported():
    graph = read(around(instance(12, link=None)), INFO)
    assert graph.notes == ("model of 'Tuner' (#12:1) gets nothing: its link ends at nothing.",)
    assert read(around(instance(12)), INFO).notes == ()


def set_node(number: int, name: Any, link: int | None, kind: str = "SetNode") -> dict[str, Any]:
    return node(number, kind, name, [socket("MODEL", "*", link)], outputs=[{"type": "*"}])


def get_node(number: int, name: Any, kind: str = "GetNode") -> dict[str, Any]:
    return node(number, kind, name, outputs=[{"type": "MODEL"}])


@pytest.mark.parametrize(
    ("kinds", "name"),
    [(("SetNode", "GetNode"), ["m"]), (("easy setNode", "easy getNode"), {"Constant": "m"})],
)
def test_a_get_node_is_its_set_node_s_input(kinds, name):
    nodes = [
        node(4, "Loader", ("a",)),
        set_node(5, name, 0, kinds[0]),
        get_node(6, name, kinds[1]),
        sampler(link=2),
    ]
    prompt = to_prompt(workflow(nodes, [0, 4, 0, 5, 0, "MODEL"], [2, 6, 0, 7, 0, "MODEL"]), INFO)
    assert set(prompt) == {"4", "7"}
    assert prompt["7"]["inputs"]["model"] == ["4", 0]


def test_set_and_get_nodes_reach_through_subgraphs_bypassed_nodes_and_primitives():
    """The Set node is outside, behind a bypassed node whose first input has another type."""
    tuner = node(3, "Tuner", (1,), [socket("amount", "FLOAT"), socket("model", "MODEL", 1)], mode=4)
    inner = [
        get_node(1, ["m"]),
        node(3, "Reroute", (), [socket("", "*", 1)], outputs=[{"type": "*"}]),
        sampler(2, link=2, sockets=[socket("steps", "INT", 4, widget=True)]),
        get_node(9, ["s"]),
    ]
    links = [[1, 1, 0, 3, 0, "MODEL"], [2, 3, 0, 2, 0, "MODEL"], [4, 9, 0, 2, 2, "INT"]]
    sub = {"id": "sub", "name": "S", "inputs": [], "outputs": [], "nodes": inner, "links": links}
    content = workflow(
        [
            node(4, "Loader", ("a",)), tuner, set_node(5, ["m"], 2), node(6, "PrimitiveNode", (9, "fixed")),
            set_node(8, ["s"], 3), node(12, "sub"),
        ],
        [1, 4, 0, 3, 1, "MODEL"], [2, 3, 0, 5, 0, "MODEL"], [3, 6, 0, 8, 0, "INT"],
        definitions={"subgraphs": [sub]},
    )  # fmt: skip
    found = to_prompt(content, INFO)["12:2"]["inputs"]
    assert (found["model"], found["steps"]) == (["4", 0], 9)


@pytest.mark.parametrize(
    ("sets", "said"),
    [([], "The Get node #6 reads 'm', and no Set node"), ([1, 2], "The Set nodes #1, #2 are all named 'm'")],
)
def test_a_get_node_without_one_set_node_is_refused(sets, said):
    nodes = [*(set_node(number, ["m"], None) for number in sets), get_node(6, ["m"]), sampler(link=2)]
    with pytest.raises(HyperAlignError, match=said):
        to_prompt(workflow(nodes, [2, 6, 0, 7, 0, "MODEL"]), INFO)


@pytest.mark.parametrize("mode", [2, 4])
def test_what_reads_a_switched_off_node_over_set_and_get_gets_nothing(mode):
    nodes = [node(4, "Loader", ("a",), mode=mode), set_node(5, ["m"], 1), get_node(6, ["m"]), sampler(link=2)]
    prompt = to_prompt(workflow(nodes, [1, 4, 0, 5, 0, "MODEL"], [2, 6, 0, 7, 0, "MODEL"]), INFO)
    assert set(prompt) == {"7"}
    assert "model" not in prompt["7"]["inputs"]


def test_nodes_that_only_switch_others_are_left_out():
    muter = node(8, "Fast Muter (rgthree)", (), [socket("", "*", 3)])
    nodes = [node(4, "Loader", ("a",)), sampler(), muter, node(9, "Label (rgthree)")]
    links = [1, 4, 0, 7, 0, "MODEL"], [3, 7, 0, 8, 0, "*"]
    assert set(to_prompt(workflow(nodes, *links), INFO)) == {"4", "7"}


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("Anything Everywhere", {}, "'Anything Everywhere' .#4. sends its input to others"),
        ("Loader", {"properties": {"ue_properties": {"ue_convert": True}}}, "'Loader' .#4. sends its input"),
        ("workflow>mine", {"outputs": [{"links": [1]}]}, "the group node 'workflow>mine'"),
    ],
)
def test_what_only_the_page_can_link_is_refused(kind, more, said):
    with pytest.raises(HyperAlignError, match=rf"{said}.*Export \(API\)"):
        to_prompt(workflow([node(4, kind, ("a",), **more), sampler()], [1, 4, 0, 7, 0, "MODEL"]), INFO)
