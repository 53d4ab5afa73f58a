"""Workflows that `sample` refuses, and files that hold none: each in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workflow_files import INFO, around, instance, node, sampler, socket, workflow

from hyperalign.cli.sample.convert import read, to_prompt, upstream
from hyperalign.cli.sample.files import load
from hyperalign.errors import HyperAlignError


def test_circles_and_subgraphs_in_themselves_are_refused():
    nodes = [node(n, "Reroute", (), [socket("", "*", n)], outputs=[{"type": "MODEL"}]) for n in (1, 2)]
    circle = workflow(
        [*nodes, sampler(link=3)], [1, 2, 0, 1, 0, "*"], [2, 1, 0, 2, 0, "*"], [3, 2, 0, 7, 0, "*"]
    )
    with pytest.raises(HyperAlignError, match="form a cycle"):
        to_prompt(circle, INFO)
    with pytest.raises(HyperAlignError, match="'Aligned' contains itself"):
        to_prompt(around(instance(12), nodes=[instance(3)]), INFO)


def test_unknown_nodes_are_named_with_their_packs_all_at_once():
    content = workflow(
        [
            node(1, "Nowhere", (), [socket("x", "MODEL", 1)], properties={"cnr_id": "some-pack"}),
            node(2, "Lost", outputs=[{"links": [1]}]),
            node(3, "Ruler"),
        ],
        [1, 2, 0, 1, 0, "MODEL"],
    )
    with pytest.raises(HyperAlignError, match=r"uses 'Lost', 'Nowhere' \(of some-pack\), which"):
        to_prompt(content, INFO)
    assert to_prompt(workflow([node(3, "Ruler")]), INFO) == {}, "linked to nothing: a helper of the page"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "is not JSON"),
        (
            '{"1": {"class_type": "Loader", "inputs": {"a": ' + "[" * 100 + "]" * 100 + "}}}",
            "lists and objects",
        ),
        ('{"1": {"class_type": ["Loader"], "inputs": {}}}', "1.class_type is .* expected a text"),
        ('{"nodes": [{"id": 1, "type": "A", "inputs": 3}]}', r"nodes\[0\].inputs is 3; expected a list"),
        ('{"nodes": [{"id": 1, "type": null}]}', r"nodes\[0\].type is None; expected a text"),
        (
            '{"nodes": [], "definitions": {"subgraphs": [{"id": "a"}]}}',
            r"definitions.subgraphs\[0\].nodes is None; expected a list",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_the_field(tmp_path: Path, content: str, said: str):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(HyperAlignError, match=said):
        load(path)


@pytest.mark.parametrize("link", [["x", 4, 0, 7, 0], [1, 4], 3, {"id": 1}, [1, 4, -1, 7, 0, "MODEL"]])
def test_a_damaged_link_is_named(link):
    with pytest.raises(HyperAlignError, match="The workflow has the link"):
        to_prompt(workflow([node(4, "Loader", ("a",)), sampler()], link), INFO)


def test_subgraphs_that_use_each_other_twice_are_refused_before_there_are_millions():
    """Thirty definitions of two nodes each would be a thousand million nodes."""
    subgraphs = [
        {"id": f"s{n}", "name": "S", "nodes": [node(i, f"s{n + 1}") for i in (1, 2)], "links": []}
        for n in range(30)
    ]
    content = workflow([node(1, "s0")], definitions={"subgraphs": subgraphs})
    with pytest.raises(HyperAlignError, match="uses subgraphs more than 10000 times"):
        to_prompt(content, INFO)


def test_a_thousand_reroutes_in_a_row_are_refused():
    nodes = [
        node(n, "Reroute", (), [socket("", "*", n)], outputs=[{"type": "MODEL"}]) for n in range(8, 1000)
    ]
    links = [[n, n + 1, 0, n, 0, "*"] for n in range(8, 999)]
    content = workflow([*nodes, sampler(link=7)], *links, [7, 8, 0, 7, 0, "MODEL"])
    with pytest.raises(HyperAlignError, match="hundreds of reroutes"):
        to_prompt(content, INFO)


def test_an_input_that_holds_a_list_is_a_value():
    content = {"1": {"class_type": "Loader", "inputs": {"file": []}, "_meta": None}}
    graph = read(content, INFO)
    assert (graph.prompt["1"]["inputs"], list(upstream(graph.prompt, "1"))) == ({"file": []}, ["1"])


def test_a_promoted_widget_may_say_which_node_it_came_from():
    shown = instance(12, [0.1, 6], properties={"proxyWidgets": [["2", "denoise", "7"], ["-1", "steps", "7"]]})
    assert to_prompt(around(shown), INFO)["12:2"]["inputs"]["steps"] == 6


def test_files_of_either_format_are_read_and_others_refused(tmp_path: Path):
    path = tmp_path / "file.json"
    api = {"1": {"class_type": "Loader", "inputs": {"file": "a"}, "_meta": {"title": "Model"}}}
    path.write_text(json.dumps(api))
    graph = read(load(path), INFO)
    assert (graph.prompt, graph.titles, graph.workflow) == (api, {"1": ("Model",)}, None)
    for content, said in (
        ("[1", "is not JSON"),
        ("{}", "is no workflow"),
        ('{"a": 1}', "is no workflow"),
        ('{"nodes": [1, 2]}', "is no workflow"),
    ):
        path.write_text(content)
        with pytest.raises(HyperAlignError, match=said):
            load(path)
    with pytest.raises(HyperAlignError, match="There is no workflow"):
        load(tmp_path / "missing.json")
    with pytest.raises(HyperAlignError, match="'Nowhere', which"):
        read({"1": {"class_type": "Nowhere", "inputs": {}}}, INFO)
