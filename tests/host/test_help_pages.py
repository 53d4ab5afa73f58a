"""The help pages: one for every node, with every input and output, an image and common mistakes."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.request import urlopen

import pytest
from PIL import Image

from scripts.schemas import inputs_of, own_nodes

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
IMAGE = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")
MOST_BYTES = 60_000


@pytest.fixture(scope="module")
def nodes(server):
    return own_nodes(server.client.object_info())


def test_every_node_has_a_page_and_every_page_a_node(nodes):
    assert {page.stem for page in PAGES} == set(nodes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_its_nodes_name_and_explains_every_input_and_output(nodes, page):
    node, text = nodes[page.stem], page.read_text(encoding="utf-8")
    assert text.startswith(f"# {node['display_name']}\n")
    bold = set(re.findall(r"\*\*([^*]+)\*\*", text))
    # Numbered inputs are documented by first and last, rejected outputs by the first one.
    names = [name for name, *_ in inputs_of(node)] + node["output_name"]
    expected = {name for name in names if not re.fullmatch(r"trace_[2-7]|rejected_.*", name)}
    assert expected - bold == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_common_mistakes_and_names_an_existing_workflow(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("\n## Common mistakes\n") == 1
    workflow = re.search(r"Example workflow: \*\*(\w+)\*\*", text)
    assert workflow is not None
    path = DOCS.parents[1] / "example_workflows" / f"{workflow[1]}.json"
    assert f'"{page.stem}"' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_a_small_image_that_the_host_serves(server, page):
    (source,) = IMAGE.findall(page.read_text(encoding="utf-8"))
    assert not source.startswith(("/", "http", "."))  # the help panel prepends the folder of the pages
    image = DOCS / source
    assert image.stat().st_size <= MOST_BYTES
    with Image.open(image) as opened:
        assert opened.width >= 400
        assert not opened.getexif()
    with urlopen(f"{server.url}/extensions/hyperalign/docs/{source}") as served:
        assert served.read() == image.read_bytes()


def test_every_node_has_search_aliases_if_the_host_supports_them(server, nodes):
    aliases = {name: node.get("search_aliases") for name, node in nodes.items()}
    if "search_aliases" in server.client.object_info()["KSampler"]:
        assert [name for name, found in aliases.items() if not found] == []
    else:
        assert set(aliases.values()) == {None}


def test_every_node_has_a_description_of_a_paragraph(nodes):
    assert {name: node["description"] for name, node in nodes.items() if len(node["description"]) < 120} == {}
