"""The schemas that saved workflows rely on stay as recorded; docs/compatibility.md says what may change."""

from __future__ import annotations

import copy

import pytest

from hyperalign.cli.sample.convert import to_prompt
from hyperalign.cli.sample.files import load
from scripts.common import ROOT
from scripts.schemas import breaking_changes, differences, read_snapshot, schemas_of


@pytest.fixture(scope="module")
def info(server):
    return server.client.object_info()


def reorder(node):
    inputs = node["input"]["required"]
    node["input"]["required"] = dict(reversed(inputs.items()))


def remove(node):
    del node["input"]["required"]["start_percent"]


def rename(node):
    inputs = node["input"]["required"]
    node["input"]["required"] = {("power" if k == "strength" else k): v for k, v in inputs.items()}


def require_more(node):
    node["input"]["required"]["fresh"] = ["FLOAT", {"default": 0.0}]


def offer_less(node):
    node["input"]["required"]["variant"][1]["options"].remove("P")


def narrow(node):
    node["input"]["required"]["strength"][1]["min"] = 0.0


def turn_into_a_socket(node):
    node["input"]["required"]["strength"][1]["forceInput"] = True


def change_a_default(node):
    node["input"]["required"]["strength"][1]["default"] = 0.5


def give_another_output(node):
    node["output"][0] = "LATENT"


BREAKING = {
    reorder: "'model' moved from place 0",
    remove: "'start_percent' was removed or renamed",
    rename: "'strength' was removed or renamed",
    require_more: "'fresh' is new and required",
    offer_less: "no longer offers ['P']",
    narrow: "takes 0.0 to 4.0 instead of -4.0 to 4.0",
    change_a_default: "has default 0.5 instead of 1.0",
    turn_into_a_socket: "has forceInput True instead of None",
    give_another_output: "has type LATENT instead of MODEL",
}


def test_the_nodes_are_as_recorded(info):
    recorded, found = read_snapshot(), schemas_of(info)
    broken = list(breaking_changes(recorded, found))
    assert not broken, "saved workflows would break: " + "; ".join(broken)
    changes = list(differences(recorded, found))
    assert not changes, "record it with `python3 scripts/schemas.py --update`: " + "; ".join(changes)


@pytest.mark.parametrize("change", BREAKING, ids=lambda change: change.__name__)
def test_a_change_that_breaks_saved_workflows_is_named(info, change):
    changed = copy.deepcopy(info)
    change(changed["HyperAlignApply"])
    broken = list(breaking_changes(schemas_of(info), schemas_of(changed)))
    assert any(BREAKING[change] in sentence for sentence in broken)


def test_a_removed_node_is_named(info):
    changed = {name: node for name, node in info.items() if name != "HyperAlignSampler"}
    (sentence,) = breaking_changes(schemas_of(info), schemas_of(changed))
    assert "HyperAlignSampler is gone" in sentence


def test_an_appended_optional_input_breaks_nothing_but_has_to_be_recorded(info):
    changed = copy.deepcopy(info)
    changed["HyperAlignApply"]["input"].setdefault("optional", {})["fresh"] = ["FLOAT", {"default": 0.0}]
    before, after = schemas_of(info), schemas_of(changed)
    assert not list(breaking_changes(before, after))
    (line,) = differences(before, after)
    assert "fresh" in line


@pytest.mark.parametrize("name", ["best_of_n", "compare_base_aligned", "reward_guidance"])
def test_a_prompt_without_optional_widgets_still_runs(server, info, name):
    prompt = to_prompt(load(ROOT / "example_workflows" / f"{name}.json"), info)
    for node in prompt.values():
        optional = info[node["class_type"]]["input"].get("optional", {})
        node["inputs"] = {
            key: value
            for key, value in node["inputs"].items()
            if key not in optional or isinstance(value, list)
        }
        node["inputs"] |= {key: 2 for key in ("steps", "count") if key in node["inputs"]}
    outputs = server.client.run(prompt).outputs
    assert any(output.get("images") for output in outputs.values())
