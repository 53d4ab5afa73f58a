"""Turns a shipped workflow, saved in the page's format, into the format that ComfyUI's API runs.

The page stores widget values by position; the server's own node declarations say which position
belongs to which input.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.comfy_client import Prompt
from scripts.common import ScriptError

Workflow = dict[str, Any]
ObjectInfo = dict[str, Any]
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}
MUTED, BYPASSED = 2, 4


def load(path: Path) -> Workflow:
    """Reads a workflow file.

    Raises:
        ScriptError: the file is missing or not in the page's format.
    """
    if not path.is_file():
        raise ScriptError(f"There is no workflow {path}.")
    workflow = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(workflow, dict) or "nodes" not in workflow:
        raise ScriptError(
            f"{path} has no list of nodes: save it from ComfyUI's page with Save, not Export (API)."
        )
    return workflow


def widget_names(declaration: dict[str, Any]) -> list[str | None]:
    """Returns the input behind each stored widget value; None where the page alone owns the value."""
    names: list[str | None] = []
    for name, kind, options in _inputs(declaration):
        if options.get("forceInput") or not (isinstance(kind, list) or kind in WIDGET_TYPES):
            continue
        names.append(name)
        if options.get("control_after_generate") or options.get("image_upload"):
            names.append(None)
    return names


def _inputs(declaration: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for group in ("required", "optional"):
        for name, specification in declaration["input"].get(group, {}).items():
            options = specification[1] if len(specification) > 1 else {}
            yield name, specification[0], options


def to_prompt(workflow: Workflow, info: ObjectInfo) -> Prompt:
    """Returns the workflow in API format. Notes are left out.

    Raises:
        ScriptError: the server lacks a node type, or a node is muted or bypassed.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: Prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        if node.get("mode") in (MUTED, BYPASSED):
            raise ScriptError(f"Node {node['id']} ({node['type']}) is muted or bypassed: switch it on.")
        inputs = dict(_widget_values(node, info))
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                inputs[socket["name"]] = sources[socket["link"]]
        title = node.get("title") or node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _widget_values(node: dict[str, Any], info: ObjectInfo) -> Iterator[tuple[str, Any]]:
    names = widget_names(_declaration(node, info))
    for name, value in zip(names, node.get("widgets_values", []), strict=False):
        if name is not None:
            yield name, value


def _declaration(node: dict[str, Any], info: ObjectInfo) -> dict[str, Any]:
    if node["type"] not in info:
        raise ScriptError(f"The workflow uses the node {node['type']!r}, which this ComfyUI does not know.")
    return info[node["type"]]


def with_values(workflow: Workflow, info: ObjectInfo, changes: dict[tuple[str, str], Any]) -> Workflow:
    """Returns a copy of the workflow with other widget values.

    Args:
        workflow: The workflow in the page's format; it stays as it is.
        info: The server's node declarations.
        changes: New value by (node id, input name).

    Raises:
        ScriptError: a node has no such widget.
    """
    changed = copy.deepcopy(workflow)
    nodes = {str(node["id"]): node for node in changed["nodes"]}
    for (node_id, name), value in changes.items():
        node = nodes[node_id]
        names = widget_names(_declaration(node, info))
        if name not in names:
            raise ScriptError(f"Node {node['type']!r} has no widget {name!r}; it has {names}.")
        node["widgets_values"][names.index(name)] = value
    return changed


def upstream(prompt: Prompt, node_id: str) -> Iterator[str]:
    """Yields a node and, nearest first, every node it depends on."""
    waiting, seen = [node_id], {node_id}
    while waiting:
        current = waiting.pop(0)
        yield current
        for value in prompt[current]["inputs"].values():
            if isinstance(value, list) and len(value) == 2 and value[0] in prompt and value[0] not in seen:
                seen.add(value[0])
                waiting.append(value[0])
