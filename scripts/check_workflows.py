"""Checks workflow files against the node declarations of a running ComfyUI.

It checks a workflow's graph and its subgraphs: nodes exist and are switched on, links join the sockets they
name, every required input has a link or a widget value, and every value is one that the node accepts. Then it
converts the workflow as `sample` does, through subgraphs, reroutes and primitive nodes, and checks what the
server would get.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hyperalign.cli.sample.convert import read
from hyperalign.cli.sample.levels import BYPASSED, MUTED, PRIMITIVE
from hyperalign.cli.sample.widgets import places
from hyperalign.errors import HyperAlignError
from scripts.schemas import ObjectInfo, inputs_of

Node = dict[str, Any]
OF_THE_PAGE = {"Note", "MarkdownNote", "Reroute", PRIMITIVE}
"""Nodes of ComfyUI's page itself; those of other packs are not there for everybody."""
ANY_TYPE = "*"
# Choices that are the user's files: a workflow names the conventional one.
FILE_CHOICES = {"ckpt_name", "unet_name", "vae_name", "clip_name1", "clip_name2", "lora_name", "hypernetwork"}
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20


def problems(workflow: dict[str, Any], info: ObjectInfo) -> Iterator[str]:
    """Yields a sentence for everything wrong with a workflow in the page's format."""
    found = [*_saved_problems(workflow, info)]
    if not any("does not know" in each for each in found):
        found += _run_problems(workflow, info)
    yield from dict.fromkeys(found)


def _saved_problems(workflow: dict[str, Any], info: ObjectInfo) -> Iterator[str]:
    subgraphs = {each["id"]: each for each in workflow.get("definitions", {}).get("subgraphs", [])}
    known = set(info) | OF_THE_PAGE | set(subgraphs)
    for graph in (workflow, *subgraphs.values()):
        links = {link[0]: link for link in map(_link, graph["links"])}
        nodes = {node["id"]: node for node in graph["nodes"]}
        for node in graph["nodes"]:
            if node["type"] not in known:
                yield f"node {node['id']} is a {node['type']}, which this ComfyUI does not know"
            elif node["type"] in info:
                name = f"node {node['id']} ({node['type']})"
                yield from (f"{name}: {each}" for each in _node_problems(node, info[node["type"]], links))
            elif node["type"] in subgraphs:
                yield from _instance_problems(node, subgraphs[node["type"]])
            if node.get("mode") in (MUTED, BYPASSED):
                yield f"node {node['id']} ({node['type']}) is switched off; what is shipped runs whole"
        yield from _link_problems(links.values(), nodes)


def _link(link: list[Any] | dict[str, Any]) -> list[Any]:
    """Returns [id, from node, from output, to node, to input, type]; subgraphs write them as objects."""
    if isinstance(link, list):
        return link
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return [link[key] for key in keys]


def _node_problems(node: Node, declaration: dict[str, Any], links: dict[int, list[Any]]) -> Iterator[str]:
    declared = {name: (group, kind, options) for name, group, kind, options in inputs_of(declaration)}
    linked = {each["name"] for each in node.get("inputs", []) if each.get("link") is not None}
    stored: Any = node.get("widgets_values") or []
    values = {name: stored[at] for name, (_, at) in places(node, declaration).items()}
    for socket in node.get("inputs", []):
        if socket["name"] not in declared:
            yield f"it has no input {socket['name']!r}"
        elif socket["type"] != declared[socket["name"]][1]:
            yield f"input {socket['name']!r} is of type {declared[socket['name']][1]}, not {socket['type']}"
        if socket.get("link") is not None and socket["link"] not in links:
            yield f"input {socket['name']!r} names link {socket['link']}, which is not there"
    for name, (group, kind, options) in declared.items():
        if name in values:
            yield from (f"{name!r} {each}" for each in _value_problems(name, values[name], kind, options))
        elif group == "required" and name not in linked:
            yield f"required input {name!r} has neither link nor value"
    yield from _output_problems(node, declaration)


def _instance_problems(node: Node, subgraph: dict[str, Any]) -> Iterator[str]:
    """Yields what does not fit between the use of a subgraph and its definition."""
    name = f"node {node['id']} ({subgraph['name']})"
    for part, link in (("inputs", "link"), ("outputs", "links")):
        here = {(each["name"], each["type"]): each for each in node.get(part, [])}
        there = [(each["name"], each["type"]) for each in subgraph.get(part, [])]
        yield from (f"{name} lacks {each} of its subgraph's {part}" for each in there if each not in here)
        linked = [each for each, socket in here.items() if socket.get(link) not in (None, [])]
        yield from (
            f"{name} has {each}, which its subgraph's {part} lack" for each in linked if each not in there
        )
    inside = {str(each["id"]) for each in subgraph["nodes"]} | {"-1"}
    for number, widget, *_ in node.get("properties", {}).get("proxyWidgets", []):
        if str(number) not in inside:
            yield f"{name} shows the widget {widget!r} of node {number}, which is not in it"


def _run_problems(workflow: dict[str, Any], info: ObjectInfo) -> Iterator[str]:
    """Yields what is wrong with the graph that the server would get."""
    try:
        graph = read(workflow, info)
    except HyperAlignError as error:
        yield str(error)
        return
    if len(workflow["nodes"]) > 1:  # else a blueprint, whose inputs are linked where it is used
        yield from graph.notes
    for number, node in graph.prompt.items():
        name = f"node {number} ({node['class_type']})"
        for key, _, kind, options in inputs_of(info[node["class_type"]]):
            if (number, key) in graph.places:
                value = node["inputs"][key]
                yield from (f"{name}: {key!r} {each}" for each in _value_problems(key, value, kind, options))


def _output_problems(node: Node, declaration: dict[str, Any]) -> Iterator[str]:
    for place, output in enumerate(node.get("outputs", [])):
        if place >= len(declaration["output"]):
            yield f"it has no output {place} ({output['name']!r})"
        elif output["type"] != declaration["output"][place]:
            yield f"output {place} is of type {declaration['output'][place]}, not {output['type']}"


def _value_problems(name: str, value: Any, kind: str, options: dict[str, Any]) -> Iterator[str]:
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": (str, int, float)}
    if not isinstance(value, types.get(kind, object)) or (isinstance(value, bool) and kind != "BOOLEAN"):
        yield f"is {value!r}, no {kind}"
    elif kind == "COMBO" and name not in FILE_CHOICES and value not in options["options"]:
        yield f"is {value!r}; offered are {options['options']}"
    elif kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        yield f"is {value}; it must be {options.get('min')} to {options.get('max')}"


def _link_problems(links: Any, nodes: dict[int, Node]) -> Iterator[str]:
    for number, source, output, target, place, kind in links:
        for end, part, slot in ((source, "outputs", output), (target, "inputs", place)):
            if end in (SUBGRAPH_INPUT, SUBGRAPH_OUTPUT):
                continue
            if end not in nodes or slot >= len(nodes[end].get(part, [])):
                yield f"link {number} ends at {part}[{slot}] of node {end}, which is not there"
                continue
            socket = nodes[end][part][slot]
            there = socket.get("links") or [] if part == "outputs" else [socket.get("link")]
            if number not in there:
                yield f"link {number} is not named by {part}[{slot}] of node {end}"
            if ANY_TYPE not in (kind, socket["type"]) and kind != socket["type"]:
                yield f"link {number} carries {kind} to a socket of type {socket['type']}"
