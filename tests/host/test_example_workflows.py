"""The workflows of the template browser and the blueprints, against the live declarations of all nodes."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from scripts.check_workflows import problems
from scripts.schemas import own_nodes

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
MOST_THUMBNAIL_BYTES = 60_000


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def node_types(workflow):
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    return {node["type"] for graph in graphs for node in graph["nodes"]}


@pytest.fixture(scope="module")
def info(server):
    return server.client.object_info()


@pytest.mark.parametrize("path", [*WORKFLOWS, *BLUEPRINTS], ids=lambda path: path.stem)
def test_a_workflow_fits_the_live_declarations(info, path):
    assert list(problems(load(path), info)) == []


def test_every_node_is_in_a_workflow(info):
    covered = set().union(*(node_types(load(path)) for path in WORKFLOWS))
    assert set(own_nodes(info)) - covered == set()


def misspell(node):
    node["type"] = "KSamplr"


def choose_what_is_not_offered(node):
    node["widgets_values"][4] = "no such sampler"


def leave_the_range(node):
    node["widgets_values"][2] = 0


def cut_a_link(node):
    node["inputs"][0]["link"] = None


def name_a_link_that_is_not_there(node):
    node["inputs"][0]["link"] = 999


def take_another_socket(node):
    node["inputs"][0]["type"] = "CLIP"


FAULTS = {
    misspell: "which this ComfyUI does not know",
    choose_what_is_not_offered: "'sampler_name' is 'no such sampler'; offered are",
    leave_the_range: "'steps' is 0; it must be 1 to 10000",
    cut_a_link: "required input 'model' has neither link nor value",
    name_a_link_that_is_not_there: "names link 999, which is not there",
    take_another_socket: "input 'model' is of type MODEL, not CLIP",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_a_workflow_is_named(info, fault):
    workflow = copy.deepcopy(load(ROOT / "example_workflows" / "base_versus_aligned.json"))
    (node,) = (node for node in workflow["nodes"] if node["type"] == "KSampler")
    fault(node)
    assert any(FAULTS[fault] in sentence for sentence in problems(workflow, info))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_a_small_thumbnail_without_metadata(path):
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size <= MOST_THUMBNAIL_BYTES
    with Image.open(thumbnail) as image:
        assert image.format == "JPEG"
        assert min(image.size) >= 200
        assert set(image.info) <= {
            "jfif",
            "jfif_version",
            "jfif_unit",
            "jfif_density",
            "progressive",
            "progression",
        }


def test_the_template_browser_lists_every_workflow(server):
    listed = server.client.get("/workflow_templates")["hyperalign"]
    assert sorted(listed) == [path.stem for path in WORKFLOWS]


def test_the_host_serves_every_blueprint(server):
    entries = server.client.get("/global_subgraphs")
    own = {
        key: entry
        for key, entry in entries.items()
        if entry["info"]["node_pack"] == "custom_nodes.hyperalign"
    }
    assert sorted(entry["name"] for entry in own.values()) == [path.stem for path in BLUEPRINTS]
    for key, entry in own.items():
        data = json.loads(server.client.get(f"/global_subgraphs/{key}")["data"])
        assert data["definitions"]["subgraphs"][0]["name"] == entry["name"]


@pytest.mark.parametrize("path", [*WORKFLOWS, *BLUEPRINTS], ids=lambda path: path.stem)
def test_a_workflow_names_no_place_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r'"(?:/\w[^"]*|[A-Z]:\\[^"]*)"|127\.0\.0\.1', text) == []
