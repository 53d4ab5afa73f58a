"""Rejects values that a dropdown does not offer; ComfyUI 0.3.75 checks them for nodes of the old API only.

The host validates a linked input with None, because its value is not known before the run: `choice_problem`
accepts None, and `check_choices` checks the value itself when the node executes.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hyperalign.errors import HyperAlignError


def choice_problem(node: type[io.ComfyNode], **values: Any) -> str | None:
    """Returns an error message for the first value that its dropdown does not offer, or None.

    Args:
        node: its schema holds the dropdowns.
        values: values by widget name, None of a linked input; lists of one value where the node takes lists.
    """
    schema = node.define_schema()
    known = {name: value for name, value in values.items() if _single(schema, value) is not None}
    return _problem(schema, known)


def check_choices(node: type[io.ComfyNode], **values: Any) -> None:
    """Raises HyperAlignError with the message of `choice_problem`, also for None: no link sends it."""
    if problem := _problem(node.define_schema(), values):
        raise HyperAlignError(problem)


def _problem(schema: io.Schema, values: dict[str, Any]) -> str | None:
    for widget in schema.inputs:
        if not isinstance(widget, io.Combo.Input) or widget.id not in values:
            continue
        value = _single(schema, values[widget.id])
        options = list(widget.options or [])
        if value not in options:
            return (
                f"{widget.id} is {value!r}; expected one of {', '.join(map(str, options))}. Choose one in the "
                "widget; the workflow may come from another version of HyperAlign, or from another ComfyUI."
            )
    return None


def _single(schema: io.Schema, value: Any) -> Any:
    """Returns the first value of a list, if the node takes lists."""
    return value[0] if schema.is_input_list and isinstance(value, list | tuple) and value else value
