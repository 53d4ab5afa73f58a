"""What tools that only read the source (ComfyUI-Manager's scanner, the registry) must find in nodes/."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

NODES = Path(__file__).resolve().parents[2] / "nodes"


def node_classes() -> list[ast.ClassDef]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(NODES.glob("*.py"))]
    classes = [each for tree in trees for each in tree.body if isinstance(each, ast.ClassDef)]
    return [each for each in classes if any(ast.unparse(base) == "io.ComfyNode" for base in each.bases)]


@pytest.mark.parametrize("node", node_classes(), ids=lambda node: node.name)
def test_a_node_id_is_a_literal_and_equals_the_class_name(node):
    schemas = [
        each
        for each in ast.walk(node)
        if isinstance(each, ast.Call) and ast.unparse(each.func) == "io.Schema"
    ]
    (schema,) = schemas
    values = {keyword.arg: keyword.value for keyword in schema.keywords}
    assert isinstance(values["node_id"], ast.Constant)
    assert values["node_id"].value == node.name
    assert isinstance(values["display_name"], ast.Constant)


def test_every_node_is_in_the_extensions_list():
    listed = {alias.name for each in ast.walk(ast.parse((NODES / "extension.py").read_text(encoding="utf-8")))
              if isinstance(each, ast.ImportFrom) and each.level == 1 for alias in each.names}  # fmt: skip
    assert {node.name for node in node_classes()} == {
        name for name in listed if name.startswith("HyperAlign")
    }
