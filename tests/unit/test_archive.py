"""What the registry asks for: archive (what is tracked, less .comfyignore), metadata and images."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tomli

from scripts import archive as scripts_archive

ROOT = Path(__file__).resolve().parents[2]
NEEDED = (
    "__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "nodes/extension.py",
    "hyperalign/hosts/comfy/model.py", "hyperalign/cli/score/sheet.html", "hyperalign/cli/audit/report.html",
    "hyperalign/cli/study/page.html", "hyperalign/cli/study/page.js", "hyperalign/cli/study/page.css",
    "web/docs/HyperAlignApply.md", "example_workflows/first_steps.jpg", "locales/zh/nodeDefs.json",
    "subgraphs/Aligned KSampler.json", "hyperalign/py.typed",
)  # fmt: skip
MOST_MEGABYTES = 60


@pytest.fixture(scope="module")
def archive() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("only a checkout knows which files are tracked")
    return {path.as_posix() for path in scripts_archive.archive()}


def test_what_the_nodes_need_is_in(archive):
    assert set(NEEDED) - archive == set()


def test_what_only_developers_need_is_out(archive):
    tops = {name.split("/")[0] for name in archive}
    assert tops.isdisjoint({"tests", "train", "scripts", "benchmarks", ".ci", "Makefile", "CONTRIBUTING.md"})
    assert tops.isdisjoint({".github", ".pre-commit-config.yaml", "CITATION.cff"})


def test_it_holds_no_compiled_files_and_no_links(archive):
    assert [name for name in archive if name.endswith((".pyc", ".so", ".pkl", ".pt", ".ckpt"))] == []
    assert [name for name in archive if (ROOT / name).is_symlink()] == []


def test_it_is_small(archive):
    assert sum((ROOT / name).stat().st_size for name in archive) < MOST_MEGABYTES * 1e6


def test_name_version_and_licence_are_as_the_registry_asks():
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert re.fullmatch(r"[a-z](?:[._-]?[a-z0-9])*", project["project"]["name"])
    assert "comfyui" not in project["project"]["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert project["project"]["license"] == {"file": "LICENSE"}
    comfy = project["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"} <= comfy.keys()
    # What has no address yet is on the list of what publishing still needs.
    to_do = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Publish")[2]
    assert [key for key, value in comfy.items() if value == "" and f"`{key}`" not in to_do] == []
    assert "urls" in project["project"] or "[project.urls] Repository" in to_do


@pytest.mark.parametrize(("name", "ratio", "widest"), [("icon", 1.0, 400), ("banner", 21 / 9, 2000)])
def test_icon_and_banner_have_the_registrys_shape(name, ratio, widest):
    root = ElementTree.parse(ROOT / "docs" / f"{name}.svg").getroot()
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert width / height == pytest.approx(ratio)
    assert width <= widest
