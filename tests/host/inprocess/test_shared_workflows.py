"""Workflows of other people, versions and computers are refused in a sentence, or they just run.

They are checked as the host checks what is queued, before any node runs.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open

from hyperalign.checkpoint import HEADER_KEY, save_atomically
from hyperalign.cli.sample.convert import to_prompt
from hyperalign.cli.sample.widgets import widgets
from hyperalign.tiny.weights import HYPERNETWORKS

WORKFLOWS = Path(__file__).resolve().parents[3] / "example_workflows"
Prompt = dict[str, dict[str, Any]]
Messages = dict[str, list[str]]


@pytest.fixture(scope="module")
def node_classes(pack: ModuleType) -> dict[str, Any]:
    """The pack's nodes, offered by the host."""
    from comfy_extras.nodes_preview_any import PreviewAny  # the host offers it in a step of its own

    import nodes

    nodes.NODE_CLASS_MAPPINGS["PreviewAny"] = PreviewAny
    extension = asyncio.run(pack.comfy_entrypoint())
    found = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    nodes.NODE_CLASS_MAPPINGS |= found
    return found


@pytest.fixture
def check(node_classes: dict[str, Any]) -> Callable[[Prompt], Messages]:
    """Says what the host says to a prompt: messages by node, none if it would run."""
    import execution

    def run(prompt: Prompt) -> Messages:
        _, error, _, nodes = asyncio.run(execution.validate_prompt("1", prompt, None))
        if error is not None and not nodes:
            return {"": [f"{error['message']} {error['details']}"]}
        return {key: [e["details"] for e in found["errors"]] for key, found in nodes.items()}

    return run


@pytest.fixture
def models(comfy: ModuleType, node_classes: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> Path:
    """models/hyperalign and models/hyperalign_rewards, empty and for one test."""
    import folder_paths

    for name in ("hyperalign", "hyperalign_rewards"):
        (tmp_path / name).mkdir()
        suffixes = {".safetensors", ".pt"}
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], suffixes))
        folder_paths.filename_list_cache.pop(name, None)
    return tmp_path


def aligned(file: str = "mine.safetensors", variant: Any = "auto") -> Prompt:
    return {
        "1": {"class_type": "HyperAlignTinyModel", "inputs": {}},
        "2": {"class_type": "HyperAlignLoader", "inputs": {"hypernetwork": file}},
        "3": {
            "class_type": "HyperAlignApply",
            "inputs": {
                "model": ["1", 0], "hypernetwork": ["2", 0], "strength": 1.0, "start_percent": 0.0,
                "end_percent": 1.0, "variant": variant,
            },
        },
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red heart"}},
        "5": {"class_type": "HyperAlignTinyLatent", "inputs": {"batch_size": 1}},
        "6": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["3", 0], "positive": ["4", 0], "negative": ["4", 0], "latent_image": ["5", 0],
                "seed": 5, "steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}},
    }  # fmt: skip


def scored(**loader: Any) -> Prompt:
    return {
        "1": {"class_type": "HyperAlignRewardLoader", "inputs": {"reward": "tiny reward", **loader}},
        "2": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
        "3": {
            "class_type": "HyperAlignRewardScore",
            "inputs": {"reward": ["1", 0], "images": ["2", 0], "prompt": "a red heart"},
        },
    }


def said(messages: Messages, node: str) -> str:
    assert messages.keys() == {node}, messages
    return " ".join(messages[node])


def test_a_file_that_is_there_is_no_problem(check: Any, models: Path) -> None:
    shutil.copy(HYPERNETWORKS / "tiny_s.safetensors", models / "hyperalign" / "mine.safetensors")
    assert check(aligned()) == {}


def test_a_missing_hypernetwork_is_named_with_its_folder(check: Any, models: Path) -> None:
    message = said(check(aligned()), "2")
    assert "no hypernetwork 'mine.safetensors'" in message
    assert f"Put the .safetensors file into {models / 'hyperalign'} and press R" in message
    assert "Value not in list" not in message


@pytest.mark.parametrize(
    "name", ["styles\\mine.safetensors", "other/mine.safetensors", "../mine.safetensors"]
)
def test_a_file_in_another_subfolder_is_offered(check: Any, models: Path, name: str) -> None:
    (models / "hyperalign" / "mine").mkdir()
    shutil.copy(HYPERNETWORKS / "tiny_s.safetensors", models / "hyperalign" / "mine" / "mine.safetensors")
    message = said(check(aligned(name)), "2")
    assert f"found {Path('mine') / 'mine.safetensors'}. Choose it in the widget." in message


def test_a_workflow_made_where_no_file_was_says_where_one_belongs(check: Any, models: Path) -> None:
    from hyperalign.hosts.comfy.files import NONE_FOUND

    message = said(check(aligned(NONE_FOUND)), "2")
    assert f"Put the .safetensors file into {models / 'hyperalign'}" in message
    assert NONE_FOUND not in message


def test_a_file_of_a_newer_version_is_refused_before_anything_runs(check: Any, models: Path) -> None:
    source, path = HYPERNETWORKS / "tiny_s.safetensors", models / "hyperalign" / "mine.safetensors"
    with safe_open(str(source), framework="pt") as file:
        header = json.loads(file.metadata()[HEADER_KEY]) | {"format_version": 7}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_atomically(tensors, path, {HEADER_KEY: json.dumps(header)})
    assert "format version 7; this release reads version 2. Update HyperAlign" in said(check(aligned()), "2")


def test_missing_reward_weights_are_named_with_size_page_and_folder(check: Any, models: Path) -> None:
    message = said(check(scored(reward="hpsv2.1")), "1")
    assert "HPS_v2.1_compressed.pt (2.0 GB)" in message
    assert "huggingface.co/xswu/HPSv2" in message
    assert str(models / "hyperalign_rewards") in message
    assert check(scored(reward="hpsv2.1", download=True)) == {}


@pytest.mark.parametrize("download", [False, True])
def test_an_unknown_reward_is_refused(check: Any, models: Path, download: bool) -> None:
    message = said(check(scored(reward="hpsv4", download=download)), "1")
    assert "reward is 'hpsv4'; expected one of tiny reward" in message


def test_no_dropdown_takes_a_value_that_it_does_not_have(node_classes: dict[str, Any]) -> None:
    import execution
    from comfy_api.latest import io

    seen = 0
    for name, node in node_classes.items():
        for widget in node.GET_SCHEMA().inputs:
            if isinstance(widget, io.Combo.Input):
                prompt: Prompt = {"1": {"class_type": name, "inputs": {widget.id: "of tomorrow"}}}
                _, errors, _ = asyncio.run(execution.validate_inputs("1", prompt, "1", {}))
                about = [error["details"] for error in errors if "of tomorrow" in error["details"]]
                assert about, f"{name}.{widget.id} takes a value that is not in its list: {errors}"
                seen += 1
    assert seen >= 10


def test_an_unknown_variant_is_refused_before_anything_runs(check: Any, models: Path) -> None:
    shutil.copy(HYPERNETWORKS / "tiny_s.safetensors", models / "hyperalign" / "mine.safetensors")
    message = said(check(aligned(variant="Q")), "3")
    assert "variant is 'Q'; expected one of auto, S, P, I. Choose one in the widget" in message


def test_no_number_takes_a_value_of_another_kind_or_range(node_classes: dict[str, Any]) -> None:
    import execution
    from comfy_api.latest import io

    seen = 0
    for name, node in node_classes.items():
        for widget in node.GET_SCHEMA().inputs:
            if not isinstance(widget, io.Int.Input | io.Float.Input) or widget.force_input:
                continue
            for value in ("euler", None, 1e30):
                prompt: Prompt = {"1": {"class_type": name, "inputs": {widget.id: value}}}
                _, errors, _ = asyncio.run(execution.validate_inputs("1", prompt, "1", {}))
                about = [error for error in errors if error["extra_info"].get("input_name") == widget.id]
                assert about, f"{name}.{widget.id} takes {value!r}: {errors}"
                assert "TypeError" not in str(about) and "supported between" not in str(about)
            seen += 1
    assert seen >= 15


@pytest.mark.parametrize("value", [3, True, {"a": 1}])
def test_values_of_another_kind_are_refused_too(check: Any, models: Path, value: Any) -> None:
    shutil.copy(HYPERNETWORKS / "tiny_s.safetensors", models / "hyperalign" / "mine.safetensors")
    assert "expected one of auto, S, P, I" in said(check(aligned(variant=value)), "3")


def test_a_file_of_no_name_is_refused(check: Any, models: Path) -> None:
    assert "no hypernetwork ''" in said(check(aligned(file="")), "2")


def test_a_value_of_null_is_refused_when_the_node_runs(node_classes: dict[str, Any], models: Path) -> None:
    """Before the run, the host does not tell it from a linked value."""
    with pytest.raises(ValueError, match="no hypernetwork 'None'"):
        node_classes["HyperAlignLoader"].execute(hypernetwork=None)
    with pytest.raises(ValueError, match="variant is None; expected one of auto, S, P, I"):
        node_classes["HyperAlignApply"].execute(None, None, 1.0, 0.0, 1.0, variant=None)


@pytest.fixture(scope="module")
def object_info(node_classes: dict[str, Any]) -> dict[str, Any]:
    """What /object_info says about the pack's nodes and those of the host's own that the examples use."""
    import nodes

    host = {
        name: {"input": node.INPUT_TYPES(), "display_name": name}
        for name, node in nodes.NODE_CLASS_MAPPINGS.items()
        if name not in node_classes
    }
    return host | {name: dict(node.GET_NODE_INFO_V1()) for name, node in node_classes.items()}


def of_an_older_version(workflow: dict[str, Any], missing: int) -> dict[str, Any]:
    """A workflow whose nodes of the pack were saved before their last widgets were there."""
    older = json.loads(json.dumps(workflow))
    for node in older["nodes"]:
        if node["type"].startswith("HyperAlign") and len(node.get("widgets_values") or []) > 1:
            node["widgets_values"] = node["widgets_values"][: max(1, len(node["widgets_values"]) - missing)]
            kept = len(node["widgets_values"])
            named = [socket for socket in node.get("inputs") or [] if socket.get("widget")]
            gone = {socket["name"] for socket in named[kept:] if socket.get("link") is None}
            node["inputs"] = [s for s in node.get("inputs") or [] if s["name"] not in gone]
    return older


@pytest.mark.parametrize("missing", [0, 1, 3, 100])
@pytest.mark.parametrize("name", ["select_by_reward", "best_of_n", "compare_base_aligned", "score_rewards"])
def test_a_workflow_of_an_older_version_runs_with_defaults(
    check: Any, object_info: dict[str, Any], name: str, missing: int
) -> None:
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    before = to_prompt(workflow, object_info)
    older = to_prompt(of_an_older_version(workflow, missing), object_info)
    assert check(older) == {}
    for key, node in older.items():
        for widget in widgets(object_info[node["class_type"]], node["inputs"]):
            assert node["inputs"].get(widget.name) in (before[key]["inputs"].get(widget.name), widget.default)
    if missing == 0:
        assert older == before


def test_a_workflow_that_only_lacks_what_came_later_is_unchanged(object_info: dict[str, Any]) -> None:
    workflow = json.loads((WORKFLOWS / "score_rewards.json").read_text(encoding="utf-8"))
    loaders = [node for node in workflow["nodes"] if node["type"] == "HyperAlignRewardLoader"]
    assert [len(node["widgets_values"]) for node in loaders] == [
        1
    ]  # saved before weight, combination, download
    (loader,) = (
        n for n in to_prompt(workflow, object_info).values() if n["class_type"] == "HyperAlignRewardLoader"
    )
    assert loader["inputs"] | {"reward": ""} == {
        "reward": "", "weight": 1.0, "combination": "sum", "download": False,
    }  # fmt: skip
