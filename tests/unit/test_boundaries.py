"""Who may import whom, where import-linter cannot look: nodes/ is only a package inside ComfyUI."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = sorted((ROOT / "nodes").glob("*.py"))
CORE = sorted((ROOT / "hyperalign").rglob("*.py"))
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "latent_preview",
    "nodes",
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (relative level, first name) of every import in a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_nodes_know_the_core_and_the_host_only(path: Path) -> None:
    for level, name in imports(path):
        if level == 2:
            assert name == "hyperalign", f"{path.name} reaches ..{name}"
        elif level == 0:
            foreign = {"hyperalign", "train", "scripts", "diffusers", "transformers", "numpy"}
            assert name not in foreign, f"{path.name} imports {name}: use ..hyperalign, and only that"


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_itself_relatively(path: Path) -> None:
    """Inside ComfyUI an absolute import would load a second copy of every class."""
    assert not [name for level, name in imports(path) if level == 0 and name == "hyperalign"]


def test_the_entry_point_imports_nothing_of_the_host_at_import_time() -> None:
    """pytest and packaging tools import the root package where there is no ComfyUI."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    modules = [name for node in tree.body if isinstance(node, ast.Import) for name in node.names]
    assert not [name for name in modules if name.name.split(".")[0] in HOST_MODULES]
    froms = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(node.module in ("__future__", "typing", "logging") for node in froms)
