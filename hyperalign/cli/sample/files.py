"""Workflow files in both of ComfyUI's formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard, cast

from ...errors import HyperAlignError, shortened
from ...files import first_line
from .shape import check_depth, check_prompt, check_workflow

Workflow = dict[str, Any]
"""A graph as the page saves it: nodes with widget values by position, and links."""
Prompt = dict[str, dict[str, Any]]
"""A graph as the server runs it (API format): node id -> class_type, inputs and _meta."""
ObjectInfo = dict[str, Any]
"""The server's declarations of its nodes, by their types."""
Event = dict[str, Any]
"""One message of the server's websocket: type and data."""


def load(path: Path) -> Workflow | Prompt:
    """Reads a workflow file of either format.

    Raises HyperAlignError when it is missing, no JSON, or neither format.
    """
    if not path.is_file():
        raise HyperAlignError(f"There is no workflow {path}; give a .json saved from ComfyUI.")
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        said = shortened(first_line(error))
        raise HyperAlignError(f"{path} is not JSON ({said}); save the workflow again.") from error
    if not isinstance(content, dict) or not (is_workflow(content) or is_prompt(content)):
        raise HyperAlignError(
            f"{path} is no workflow: expected a list of nodes, as ComfyUI's page saves it, or nodes with a "
            "class_type each, as Export (API) does. Save the workflow again."
        )
    try:
        check_depth(content)
        check_workflow(content) if is_workflow(content) else check_prompt(content)
    except HyperAlignError as error:
        raise HyperAlignError(f"{path} is damaged: {error}. Save the workflow again.") from error
    return cast("Workflow", content)


def is_workflow(content: dict[str, Any]) -> TypeGuard[Workflow]:
    """Whether this is the page's format."""
    nodes = content.get("nodes")
    return isinstance(nodes, list) and all(
        isinstance(node, dict) and {"id", "type"} <= node.keys() for node in cast("list[Any]", nodes)
    )


def is_prompt(content: dict[str, Any]) -> TypeGuard[Prompt]:
    """Whether this is the API format."""
    return bool(content) and all(
        isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict)
        for node in content.values()
    )
