"""The help panel of every node."""

import re

import pytest

from scripts.common import ROOT

PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
HEADING = re.compile(r"^# (.+)$", re.MULTILINE)


def test_every_node_has_a_help_page(front):
    known = front.page.evaluate("() => Object.keys(LiteGraph.registered_node_types)")
    assert {name for name in known if name.startswith("HyperAlign")} == {path.stem for path in PAGES}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_help_panel_opens_with_the_nodes_page(front, pack, path):
    page = (pack / "web" / "docs" / path.name).read_text(encoding="utf-8")
    heading = HEADING.search(page)
    assert heading is not None
    shown = front.ask_for_help(front.add(path.stem))
    shown.get_by_role("heading", name=heading[1], exact=True, level=1).wait_for()
    front.keep(f"help-{path.stem}")
    assert broken_images(shown) == []
    assert shown.get_by_role("heading", level=2).count() == page.count("\n## ")


def broken_images(shown):
    """Returns the addresses of the images that do not load."""
    load = "image => image.decode().then(() => [], () => [image.src])"
    return shown.locator("img").evaluate_all(
        f"async images => (await Promise.all(images.map({load}))).flat()"
    )
