"""The page in the pack's languages: nodes have their translated names, and no text trips the page."""

import json

import pytest
from front_end import FrontEnd

from scripts.common import ROOT

LANGUAGES = ["zh", "ja", "ko"]
SET_LANGUAGE = "language => app.extensionManager.setting.set('Comfy.Locale', language)"
NAMES = """type => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    return [node.title, ...node.inputs.map(input => input.localized_name ?? input.label ?? input.name)];
}"""


@pytest.mark.parametrize("language", LANGUAGES)
def test_nodes_are_shown_in_the_language_of_the_page(browser, server, pictures, bare_errors, language):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    front = FrontEnd(browser, server.url, False, pictures)
    try:
        front.open()
        front.page.evaluate(SET_LANGUAGE, language)
        front.page.reload()
        front.page.wait_for_function("() => window.app?.graph?.nodes && window.app.canvas")
        front.close_dialogs()
        for node_type, expected in texts.items():
            title, *inputs = front.page.evaluate(NAMES, node_type)
            assert title == expected["display_name"]
            assert set(inputs) <= {each["name"] for each in expected.get("inputs", {}).values()}
        front.keep(f"locale-{language}")
        assert set(front.errors) - bare_errors == set()
    finally:
        front.page.evaluate(SET_LANGUAGE, "en")
        front.page.wait_for_timeout(500)  # the setting reaches the server
        front.page.close()
