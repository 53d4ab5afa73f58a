"""What a workflow file must look like, so that whatever reads it further can rely on that."""

from __future__ import annotations

from typing import Any, cast

from ...errors import HyperAlignError, shortened, shown

DEEPEST = 60
"""Lists and objects in each other; neither the page nor the server comes near it."""
NAMES = {int: "a whole number", str: "a text", dict: "an object", list: "a list"}
ID = (int, str)

# Of a field: the types it may have, [what each item of a list is], or {the fields of an object}. Fields may
# be missing or null, those with a ! may not; other fields are not looked at.
Rule = Any
NAMED: Rule = {"name!": str}
SOCKET: Rule = {"name!": str, "link": int, "widget": NAMED}
NODE: Rule = {
    "id!": ID, "type!": str, "title": str, "mode": int, "inputs": [SOCKET], "outputs": [{"links": list}],
    "widgets_values": (list, dict),
    "properties": {"ue_properties": dict, "proxyWidgets": [list], "cnr_id": str, "aux_id": str},
}  # fmt: skip
GRAPH: Rule = {"nodes!": [NODE], "links": list}
SUBGRAPH: Rule = GRAPH | {"id!": ID, "name": str, "inputs": [NAMED], "outputs": [NAMED]}
WORKFLOW: Rule = GRAPH | {"definitions": {"subgraphs": [SUBGRAPH]}}
API_NODE: Rule = {"class_type!": str, "inputs!": dict, "_meta": {"title": str}}


def check_depth(value: Any) -> None:
    """Raises HyperAlignError if a JSON value has lists and objects in each other beyond DEEPEST."""
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise HyperAlignError(f"it has more than {DEEPEST} lists and objects in each other")
        inner = [cast("list[Any]", one) for one in level if isinstance(one, list)]
        inner += [list(cast("dict[str, Any]", one).values()) for one in level if isinstance(one, dict)]
        level, depth = [item for items in inner for item in items if isinstance(item, list | dict)], depth + 1


def check_workflow(content: dict[str, Any]) -> None:
    """Raises HyperAlignError unless this has the page's format; says which field has not."""
    _check(content, WORKFLOW, "")


def check_prompt(content: dict[str, Any]) -> None:
    """Raises HyperAlignError unless this has the API format; says which field has not."""
    for key, node in content.items():
        _check(node, API_NODE, key)


def _check(value: Any, rule: Rule, where: str) -> None:
    kinds: tuple[type, ...] = (
        rule if isinstance(rule, tuple) else (rule if isinstance(rule, type) else type(rule),)
    )
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(NAMES[kind] for kind in kinds)
        raise HyperAlignError(f"{shortened(where)} is {shown(value)}; expected {expected}")
    if isinstance(rule, list):
        for at, item in enumerate(cast("list[Any]", value)):
            _check(item, rule[0], f"{where}[{at}]")
    elif isinstance(rule, dict):
        fields = cast("dict[str, Any]", value)
        for key, inner in cast("dict[str, Rule]", rule).items():
            name = key.removesuffix("!")
            if fields.get(name) is not None or key != name:
                _check(fields.get(name), inner, f"{where}.{name}".lstrip("."))
