"""Checks workflow files against the node declarations of a running ComfyUI.

It checks a workflow's graph and its subgraphs: nodes exist, links join the sockets they name, every required
input has a link or a widget value, and every value is one that the node accepts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hyperalign.cli.sample.widgets import places
from scripts.schemas import ObjectInfo, inputs_of

Node = dict[str, Any]
NOTES = {"Note", "MarkdownNote"}
ANY_TYPE = "*"
# Choices that are the user's files: a workflow names the conventional one.
FILE_CHOICES = {"ckpt_name", "unet_name", "vae_name", "clip_name1", "clip_name2", "lora_name", "hypernetwork"}
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20


def problems(workflow: dict[str, Any], info: ObjectInfo) -> Iterator[str]:
    """Yields a sentence for everything wrong with a workflow in the page's format."""
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    known = set(info) | NOTES | {each["id"] for each in subgraphs}
    for graph in (workflow, *subgraphs):
        links = {link[0]: link for link in map(_link, graph["links"])}
        nodes = {node["id"]: node for node in graph["nodes"]}
        for node in graph["nodes"]:
            if node["type"] not in known:
                yield f"node {node['id']} is a {node['type']}, which this ComfyUI does not know"
            elif node["type"] in info:
                name = f"node {node['id']} ({node['type']})"
                yield from (f"{name}: {each}" for each in _node_problems(node, info[node["type"]], links))
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


def _output_problems(node: Node, declaration: dict[str, Any]) -> Iterator[str]:
    for place, output in enumerate(node.get("outputs", [])):
        if place >= len(declaration["output"]):
            yield f"it has no output {place} ({output['name']!r})"
        elif output["type"] != declaration["output"][place]:
            yield f"output {place} is of type {declaration['output'][place]}, not {output['type']}"


def _value_problems(name: str, value: Any, kind: str, options: dict[str, Any]) -> Iterator[str]:
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": (str, int, float)}
    if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
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
