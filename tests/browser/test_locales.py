"""The page in the pack's languages: nodes have their translated names, and no text trips the page."""

import json

import pytest
from front_end import FrontEnd

from scripts.common import ROOT

LANGUAGES = ["zh", "ja", "ko"]
NAMES = """type => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    return [node.title, ...node.inputs.map(input => input.localized_name ?? input.label ?? input.name)];
}"""


@pytest.mark.parametrize("language", LANGUAGES)
def test_nodes_are_shown_in_the_language_of_the_page(browser, server, screenshots, bare_errors, language):
    front = FrontEnd(browser, server.url, False, screenshots)
    try:
        front.open(language=language)
        # The front end 1.32 forgets the texts of every pack when it loads a language.
        shown = "en" if front.version < (1, 33) else language
        texts = json.loads((ROOT / "locales" / shown / "nodeDefs.json").read_text(encoding="utf-8"))
        for node_type, expected in texts.items():
            title, *inputs = front.page.evaluate(NAMES, node_type)
            assert title == expected["display_name"]
            assert set(inputs) <= {each["name"] for each in expected.get("inputs", {}).values()}
        front.keep(f"locale-{language}")
        assert set(front.errors) - bare_errors == set()
    finally:
        front.page.close()
