"""What publishing needs: known placeholders, versions that agree, forms that ask for the workflow."""

import re
import subprocess
from pathlib import Path

import pytest
import tomli
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDER = "https://repository.invalid/hyperalign"
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def to_publish() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Publish")[2]


def test_every_placeholder_is_listed_and_marked():
    if not (ROOT / ".git").exists():
        pytest.skip("only a checkout knows which files are tracked")
    found = subprocess.run(
        ["git", "grep", "--untracked", "-lF", PLACEHOLDER, "--", ":!CONTRIBUTING.md", ":!tests"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert sorted(found) == sorted(re.findall(r"^\| `(.+?)` \|", to_publish(), re.MULTILINE))
    for name in found:
        assert (ROOT / name).read_text(encoding="utf-8").count("PLACEHOLDER") == 1


def test_publishing_stops_at_a_placeholder():
    checks, publish = read(".github/workflows/publish.yml")["jobs"]["publish"]["steps"][-2:]
    host = PLACEHOLDER.split("/")[2]
    assert re.search(r"grep -n '(.+?)' pyproject.toml CITATION.cff", checks["run"])[1] == re.escape(host)
    assert publish["uses"].startswith("Comfy-Org/publish-node-action@")


def test_a_tag_is_published_after_its_tests_on_three_systems():
    publish = read(".github/workflows/publish.yml")
    assert publish[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as true
    assert publish["jobs"]["publish"]["needs"] == "tests"
    assert publish["jobs"]["tests"]["uses"] == "./.github/workflows/tests.yml"
    tests = read(".github/workflows/tests.yml")["jobs"]["tests"]
    assert tests["strategy"]["matrix"]["os"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    assert tests["steps"][-1]["run"] == ".ci/run"


def test_ci_runs_the_readme_s_test_command_and_imports_the_wheel():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make test" in script and "make test" in readme
    assert "scripts/test.py" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "scripts/check_wheel.py" in script


@pytest.mark.parametrize("name", ["bug", "trainer", "wish"])
def test_issue_forms_ask_for_the_workflow(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    labels = [field["attributes"]["label"] for field in form["body"]]
    assert any("workflow JSON" in label or "Workflow JSON" in label for label in labels)
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)


def test_a_bug_cannot_be_reported_without_its_workflow():
    workflow = next(f for f in read(".github/ISSUE_TEMPLATE/bug.yml")["body"] if f["id"] == "workflow")
    assert workflow["validations"] == {"required": True}
    assert workflow["attributes"]["render"] == "json"


def test_ruff_is_the_same_before_a_commit_and_in_the_tests():
    hooks = {entry["repo"]: entry["rev"] for entry in read(".pre-commit-config.yaml")["repos"]}
    pinned = next(line for line in PROJECT["project"]["optional-dependencies"]["dev"] if "ruff" in line)
    assert hooks["https://github.com/astral-sh/ruff-pre-commit"] == f"v{pinned.partition('==')[2]}"


def test_the_citation_names_this_version_and_address():
    citation = read("CITATION.cff")
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Repository"]


def test_the_wheel_is_hyperalign_alone_and_typed():
    setuptools = PROJECT["tool"]["setuptools"]
    assert setuptools["packages"]["find"]["include"] == ["hyperalign*"]
    assert "py.typed" in setuptools["package-data"]["hyperalign"]
    assert (ROOT / "hyperalign/py.typed").read_bytes() == b""


def test_the_registry_is_told_the_front_end_and_nothing_else_to_install():
    """Its client takes the front end out of the dependencies; ComfyUI 0.3.75 brings this one."""
    assert PROJECT["project"]["dependencies"] == ["comfyui-frontend-package>=1.32.9"]
    assert PROJECT["tool"]["comfy"]["requires-comfyui"] == ">=0.3.75"
