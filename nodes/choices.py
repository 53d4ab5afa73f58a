"""Rejects values that a dropdown does not offer; ComfyUI 0.3.75 checks them for nodes of the old API only."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io


def choice_problem(node: type[io.ComfyNode], **values: Any) -> str | None:
    """Returns an error message for the first value that its dropdown does not offer, or None.

    Args:
        node: its schema holds the dropdowns.
        values: values by widget name; lists of one value where the node takes lists.
    """
    for widget in node.define_schema().inputs:
        if not isinstance(widget, io.Combo.Input) or widget.id not in values:
            continue
        given = values[widget.id]
        value = given[0] if isinstance(given, list) and given else given
        options = list(widget.options or [])
        if value not in options:
            return (
                f"{widget.id} is {value!r}; expected one of {', '.join(map(str, options))}. Choose one in the "
                "widget; the workflow may come from another version of HyperAlign, or from another ComfyUI."
            )
    return None
