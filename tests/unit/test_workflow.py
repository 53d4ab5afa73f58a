"""Workflows from the page's format to the API's."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.common import ScriptError
from scripts.workflow import load, to_prompt, upstream, widget_names, with_values

INFO: dict[str, Any] = {
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "name": [["euler", "heun"], {}],
                "variant": ["COMBO", {"options": ["auto", "S"]}],
                "wired": ["FLOAT", {"forceInput": True}],
            },
            "optional": {"denoise": ["FLOAT", {}]},
        }
    },
    "Loader": {"input": {"required": {"file": [["a", "b"]]}}},
}
WORKFLOW: dict[str, Any] = {
    "nodes": [
        {"id": 4, "type": "Loader", "widgets_values": ["a"]},
        {
            "id": 7, "type": "Sampler", "widgets_values": [5, "fixed", 25, "heun", "auto", 0.5],
            "inputs": [{"name": "model", "link": 1}, {"name": "wired", "link": None}],
        },
        {"id": 9, "type": "MarkdownNote", "widgets_values": ["read me"]},
    ],
    "links": [[1, 4, 0, 7, 0, "MODEL"]],
}  # fmt: skip


def test_the_seeds_companion_value_is_skipped():
    assert widget_names(INFO["Sampler"]) == ["seed", None, "steps", "name", "variant", "denoise"]


def test_widgets_links_and_notes():
    prompt = to_prompt(WORKFLOW, INFO)
    assert set(prompt) == {"4", "7"}
    assert prompt["7"]["inputs"] == {
        "seed": 5, "steps": 25, "name": "heun", "variant": "auto", "denoise": 0.5, "model": ["4", 0],
    }  # fmt: skip
    assert list(upstream(prompt, "7")) == ["7", "4"]


def test_changes_go_to_a_copy():
    changed = with_values(WORKFLOW, INFO, {("7", "steps"): 3, ("4", "file"): "b"})
    prompt = to_prompt(changed, INFO)
    assert (prompt["7"]["inputs"]["steps"], prompt["4"]["inputs"]["file"]) == (3, "b")
    assert to_prompt(WORKFLOW, INFO)["7"]["inputs"]["steps"] == 25


def test_a_widget_that_does_not_exist_is_named():
    with pytest.raises(ScriptError, match="no widget 'speed'"):
        with_values(WORKFLOW, INFO, {("7", "speed"): 1})


def test_unknown_nodes_are_named():
    with pytest.raises(ScriptError, match="'Sampler', which this ComfyUI does not know"):
        to_prompt(WORKFLOW, {"Loader": INFO["Loader"]})


def test_bypassed_nodes_are_refused():
    workflow = {"nodes": [WORKFLOW["nodes"][0] | {"mode": 4}], "links": []}
    with pytest.raises(ScriptError, match="muted or bypassed"):
        to_prompt(workflow, INFO)


def test_api_files_are_told_from_workflows(tmp_path: Path):
    path = tmp_path / "api.json"
    path.write_text(json.dumps({"1": {"class_type": "Loader", "inputs": {}}}))
    with pytest.raises(ScriptError, match="no list of nodes"):
        load(path)
