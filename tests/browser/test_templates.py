"""The pack's workflows in the template browser: all there, and each opens whole."""

import pytest
from front_end import read

from scripts.common import ROOT

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


def test_the_template_browser_lists_the_packs_workflows(front):
    cards = front.open_templates()
    listed = {card.get_attribute("data-testid") for card in cards.all()}
    front.keep("templates")
    assert listed == {f"template-workflow-{path.stem}" for path in WORKFLOWS}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_template_opens_without_a_missing_node_or_a_new_error(front, bare_errors, pack, path):
    workflow = read(pack, path.stem)
    with front.listening() as heard:
        front.open_template(path.stem, len(workflow["nodes"]))
        front.keep(f"opened-{path.stem}")
    assert front.missing_nodes() == []
    assert front.overlaps() == []
    assert front.dialog.count() == front.alert.count() == 0
    assert set(heard) - bare_errors == set()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_opened_template_holds_the_saved_values(front, pack, path):
    workflow = read(pack, path.stem)
    front.load(workflow)
    shown = front.widget_values()
    for node in workflow["nodes"]:
        if node["type"].startswith("HyperAlign"):
            saved = node.get("widgets_values", [])
            assert shown[str(node["id"])][: len(saved)] == saved, node["type"]


def test_a_missing_node_would_be_noticed(front, pack):
    workflow = read(pack, WORKFLOWS[0].stem)
    workflow["nodes"][0]["type"] = "NodeOfAnotherPack"
    front.load(workflow)
    assert front.missing_nodes() == ["NodeOfAnotherPack"]
