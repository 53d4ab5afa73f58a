"""What `python -m hyperalign sample` queues is what the page would queue."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hyperalign.cli.sample.convert import read, to_prompt
from scripts.common import ROOT

SUBGRAPH = "6f7c1f0e-52b0-4d0b-9f6a-0c1f3a6a00ff"
QUEUED = "async () => (await app.graphToPrompt()).output"
SAVED = "() => app.graph.serialize()"


def node(number: int, kind: str, values: list[Any], inputs: list[Any], outputs: list[Any], **more: Any):
    place = {
        "pos": [300 * (number % 5), 250 * (number // 5)],
        "size": [270, 200],
        "flags": {},
        "order": number,
    }
    more = {"mode": 0, "properties": {}} | more
    return {
        "id": number, "type": kind, "widgets_values": values, "inputs": inputs, "outputs": outputs,
    } | place | more  # fmt: skip


def socket(name: str, kind: str, link: int | None = None, widget: bool = False) -> dict[str, Any]:
    return {"name": name, "type": kind, "link": link} | ({"widget": {"name": name}} if widget else {})


def end(name: str, kind: str, *links: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "links": list(links)}


def link(number: int, origin: int, origin_slot: int, target: int, target_slot: int, kind: str):
    ends = {"origin_id": origin, "origin_slot": origin_slot, "target_id": target, "target_slot": target_slot}
    return {"id": number, "type": kind} | ends


def everything() -> dict[str, Any]:
    """A subgraph used twice, a bypassed and a muted node, a reroute, a primitive, and a note."""
    inverter = [
        node(
            11, "EmptyImage", [32, 32, 1, 255],
            [socket("width", "INT", 1, True), socket("height", "INT", None, True)],
            [end("IMAGE", "IMAGE", 2)],
        ),
        node(12, "ImageInvert", [], [socket("image", "IMAGE", 2)], [end("IMAGE", "IMAGE", 3)]),
        node(13, "ImageScaleBy", ["area", 2.0], [socket("image", "IMAGE", 3)], [end("IMAGE", "IMAGE", 4)]),
    ]  # fmt: skip
    definition = {
        "id": SUBGRAPH, "version": 1, "revision": 0, "config": {}, "name": "Inverted", "groups": [],
        "state": {"lastGroupId": 0, "lastNodeId": 13, "lastLinkId": 4, "lastRerouteId": 0},
        "inputNode": {"id": -10, "bounding": [-200, 0, 120, 60]},
        "outputNode": {"id": -20, "bounding": [1200, 0, 120, 60]},
        "inputs": [{"id": f"{SUBGRAPH[:-2]}01", "name": "width", "type": "INT", "linkIds": [1]}],
        "outputs": [{"id": f"{SUBGRAPH[:-2]}02", "name": "IMAGE", "type": "IMAGE", "linkIds": [4]}],
        "widgets": [], "nodes": inverter, "extra": {},
        "links": [
            link(1, -10, 0, 11, 0, "INT"), link(2, 11, 0, 12, 0, "IMAGE"),
            link(3, 12, 0, 13, 0, "IMAGE"), link(4, 13, 0, -20, 0, "IMAGE"),
        ],
    }  # fmt: skip
    nodes = [
        node(1, SUBGRAPH, [48], [socket("width", "INT", None, True)], [end("IMAGE", "IMAGE", 1)]),
        node(2, SUBGRAPH, [64], [socket("width", "INT", None, True)], [end("IMAGE", "IMAGE", 2)]),
        node(3, "ImageInvert", [], [socket("image", "IMAGE", 1)], [end("IMAGE", "IMAGE", 3)], mode=4),
        node(4, "Reroute", [], [socket("", "*", 3)], [end("", "IMAGE", 4)]),
        node(5, "PreviewImage", [], [socket("images", "IMAGE", 4)], []),
        node(6, "PreviewImage", [], [socket("images", "IMAGE", 2)], [], mode=2),
        node(7, "PrimitiveNode", [96, "fixed"], [], [end("INT", "INT", 5) | {"widget": {"name": "width"}}]),
        node(
            8, "EmptyImage", [16, 16, 1, 65280],
            [socket("width", "INT", 5, True)], [end("IMAGE", "IMAGE", 6)],
        ),
        node(9, "SaveImage", ["mine"], [socket("images", "IMAGE", 6)], []),
        node(10, "MarkdownNote", ["read me"], [], []),
    ]  # fmt: skip
    links = [
        [1, 1, 0, 3, 0, "IMAGE"], [2, 2, 0, 6, 0, "IMAGE"], [3, 3, 0, 4, 0, "*"], [4, 4, 0, 5, 0, "IMAGE"],
        [5, 7, 0, 8, 0, "INT"], [6, 8, 0, 9, 0, "IMAGE"],
    ]  # fmt: skip
    return {
        "last_node_id": 13, "last_link_id": 6, "nodes": nodes, "links": links, "groups": [], "extra": {},
        "config": {}, "version": 0.4, "definitions": {"subgraphs": [definition]},
    }  # fmt: skip


WORKFLOWS = {path.stem: path for path in sorted((ROOT / "example_workflows").glob("*.json"))}


def bare(prompt: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """A prompt without what the server does not look at: titles, and widgets that only show something."""
    found: dict[str, Any] = {}
    for key, content in prompt.items():
        groups = info[content["class_type"]]["input"].values()
        declared = {name for group in groups for name in group}
        inputs = {k: v for k, v in content["inputs"].items() if k.split(".")[0] in declared}
        found[key] = {"class_type": content["class_type"], "inputs": inputs}
    return found


@pytest.fixture(scope="session")
def info(browser, server) -> dict[str, Any]:
    page = browser.new_page()
    found = page.request.get(f"{server.url}/object_info").json()
    page.close()
    return found


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_shipped_workflow_is_queued_as_the_page_queues_it(front, info, name):
    content = json.loads(WORKFLOWS[name].read_text(encoding="utf-8"))
    front.load(content)
    queued = front.page.evaluate(QUEUED)
    assert bare(to_prompt(content, info), info) == bare(queued, info)
    assert bare(to_prompt(front.page.evaluate(SAVED), info), info) == bare(queued, info)
    assert bare(read(queued, info).prompt, info) == bare(queued, info)


def test_subgraphs_and_all_that_is_virtual_are_queued_as_the_page_queues_them(front, info):
    front.load(everything())
    queued = front.page.evaluate(QUEUED)
    assert {"1:11", "2:13", "5", "8", "9"} <= queued.keys()
    assert bare(to_prompt(everything(), info), info) == bare(queued, info)
    assert bare(to_prompt(front.page.evaluate(SAVED), info), info) == bare(queued, info)


def test_the_page_opens_what_sample_embeds(front, info):
    changed = read(everything(), info).with_values({("2:11", "width"): 80, ("8", "width"): 24})
    front.load(changed.workflow)
    assert bare(front.page.evaluate(QUEUED), info) == bare(changed.prompt, info)
