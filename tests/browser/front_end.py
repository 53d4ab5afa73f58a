"""ComfyUI's page in a real browser, used as an artist uses it.

What is on the canvas is asked of the page's own `app`; what an artist sees is asked of the screen.
The names of elements here hold for the front ends 1.32 (November 2025) to 1.49 (August 2026).
"""

from __future__ import annotations

import io
import itertools
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, TimeoutError, expect

VIEWPORT = {"width": 1600, "height": 1000}
WAIT_SECONDS = 120
RUN_SECONDS = 300
PACK = "hyperalign"
"""The pack's folder under custom_nodes, and so its heading in the template browser."""
COLOURED = 128
"""Saturation of a chart's heat map and lines, whatever they show."""
BRIGHT = 170
"""No part of the dark page but text is as bright; the tiny model's images are, nearly everywhere."""

NODE_STATE = """id => {
    const node = app.graph.nodes.find(node => node.id == id);
    const shown = [...document.querySelectorAll(`[data-node-id="${id}"] img`)];
    return (shown.length ? shown : node.imgs ?? [])
        .filter(image => image.complete && image.naturalWidth > 0)
        .map(image => [image.naturalWidth, image.naturalHeight]);
}"""
SHOW_NODE = """id => {
    const node = app.graph.nodes.find(node => node.id == id);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset[0] = 620 - node.pos[0];
    app.canvas.ds.offset[1] = 240 - node.pos[1];
    app.canvas.setDirty(true, true);
}"""
SHOW_ALL = "() => app.extensionManager.command.execute('Comfy.Canvas.FitView')"
NODE_AREA = """id => {
    const shown = document.querySelector(`[data-node-id="${id}"]`)?.getBoundingClientRect();
    if (shown) return [shown.x, shown.y, shown.width, shown.height];
    const node = app.graph.nodes.find(node => node.id == id), [x, y, width, height] = node.boundingRect;
    const screen = app.canvas.canvas.getBoundingClientRect(), {scale, offset} = app.canvas.ds;
    const left = screen.x + (x + offset[0]) * scale, top = screen.y + (y + offset[1]) * scale;
    return [left, top, width * scale, height * scale];
}"""
PLACES = """() => app.graph.nodes.map(node => {
    const shown = document.querySelector(`[data-node-id="${node.id}"]`);
    let [x, y, width, height] = node.boundingRect;
    if (shown) height = shown.getBoundingClientRect().height / app.canvas.ds.scale;
    return [`${node.title} (${node.id})`, x, y, x + width, y + height];
})"""
UNKNOWN_TYPES = """() => app.graph.nodes.map(node => node.type)
    .filter(type => !(type in LiteGraph.registered_node_types))"""
WIDGET_NAMES = """id => {
    const node = app.graph.nodes.find(node => node.id == id);
    return node.widgets.filter(widget => LiteGraph.vueNodesMode || !widget.hidden).map(widget => widget.name);
}"""
CHOOSE = """([id, name, choice]) => {
    const node = app.graph.nodes.find(node => node.id == id);
    const widget = node.widgets.find(widget => widget.name === name), now = widget.value;
    if (choice !== null && choice !== now) {
        widget.value = choice;
        widget.callback?.(choice, app.canvas, node);
    }
    return now;
}"""
TWO_FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def read(pack: Path, name: str) -> dict[str, Any]:
    """Returns a shipped workflow of the pack as it is installed."""
    return json.loads((pack / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))


class FrontEnd:
    """One tab with ComfyUI's page.

    Attributes:
        page: The tab.
        vue: Whether nodes are drawn by Vue (Nodes 2.0) or on the canvas.
        errors: What the console has complained about, in the form of `plain`.
    """

    def __init__(self, browser: Browser, url: str, vue: bool, screenshots: Path) -> None:
        self.url, self.vue, self.screenshots = url, vue, screenshots
        self.errors: list[str] = []
        self.page: Page = browser.new_page(viewport=VIEWPORT, locale="en-US")
        self.page.set_default_timeout(WAIT_SECONDS * 1000)
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(self.plain(str(error))))

    def open(self, language: str = "en") -> None:
        """Loads the page for a user who has been here before."""
        settings = {"Comfy.VueNodes.Enabled": self.vue, "Comfy.TutorialCompleted": True}
        self._post("/settings", settings | {"Comfy.Locale": language})
        self.page.goto(self.url)
        if language == "en":
            self.templates_button.wait_for()
        self.page.wait_for_function("() => window.app?.graph?.nodes && window.app.canvas")
        self.settle()

    @property
    def mode(self) -> str:
        """A word for file names."""
        return "vue" if self.vue else "canvas"

    @property
    def version(self) -> tuple[int, ...]:
        """The front end's version, such as (1, 32, 9)."""
        text: str = self.page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
        return tuple(int(number) for number in text.split("."))

    @property
    def templates_button(self) -> Locator:
        """The sidebar's way to the template browser."""
        return self.page.get_by_role("button", name="Templates", exact=True)

    @property
    def dialog(self) -> Locator:
        """Whatever dialog covers the canvas."""
        return self.page.locator("[role=dialog]:visible")

    @property
    def help(self) -> Locator:
        """The text of the help panel."""
        return self.page.locator(".node-help-content:visible")

    @property
    def alert(self) -> Locator:
        """A message in the corner, such as that of a workflow that does not fit the page's format."""
        return self.page.locator(".p-toast-message:visible")

    def settle(self) -> None:
        """Waits until what was asked for is drawn."""
        self.page.evaluate(TWO_FRAMES)

    def close_dialogs(self) -> None:
        """Closes what covers the canvas."""
        while count := self.dialog.count():
            self.dialog.last.locator("button:has(.pi-times), [aria-label^=Close]").first.click()
            expect(self.dialog).not_to_have_count(count, timeout=WAIT_SECONDS * 1000)

    def open_templates(self) -> Locator:
        """Opens the template browser at the pack's heading; returns its cards."""
        self.templates_button.click()
        self.dialog.get_by_text(PACK, exact=True).first.click()
        cards = self.dialog.locator("[data-testid^=template-workflow-]:not([data-testid$=-content])")
        cards.first.wait_for()
        return cards

    def open_template(self, name: str, nodes: int) -> None:
        """Opens a shipped workflow by its card and waits until its nodes are there."""
        self.open_templates()
        self.dialog.get_by_test_id(f"template-workflow-{name}").click()
        self.page.wait_for_function("nodes => app.graph.nodes.length === nodes", arg=nodes)
        self.page.get_by_text(name, exact=True).first.wait_for()  # its tab
        self.settle()

    def load(self, workflow: dict[str, Any]) -> None:
        """Puts a workflow on the canvas, as dropping its file there does."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.settle()

    def missing_nodes(self) -> list[str]:
        """Returns the types on the canvas that the page does not know."""
        return self.page.evaluate(UNKNOWN_TYPES)

    def overlaps(self) -> list[tuple[str, str]]:
        """Returns the titles of each two nodes of which one covers a part of the other."""
        nodes: list[tuple[str, float, float, float, float]] = self.page.evaluate(PLACES)
        return [
            (one[0], other[0])
            for one, other in itertools.combinations(nodes, 2)
            if one[1] < other[3] and other[1] < one[3] and one[2] < other[4] and other[2] < one[4]
        ]

    def widget_values(self) -> dict[str, list[Any]]:
        """Returns by node id what the page would save for each of the pack's nodes."""
        saved = "() => app.graph.nodes.map(node => [String(node.id), node.serialize().widgets_values ?? []])"
        return dict(self.page.evaluate(saved))

    def run(self) -> dict[str, Any]:
        """Clicks Run and waits for the end; returns what each node showed, by node id.

        Raises:
            AssertionError: the run failed or took too long.
        """
        known = set(self._get("/history"))
        self.page.get_by_test_id("queue-button").click()
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            new = [run for name, run in self._get("/history").items() if name not in known]
            if new:
                assert new[0]["status"]["status_str"] == "success", new[0]["status"]["messages"]
                return new[0]["outputs"]
            self.page.wait_for_timeout(200)
        raise AssertionError(f"The run was not done after {RUN_SECONDS} s.")

    def images(self, node: str) -> list[tuple[int, int]]:
        """Waits for a node's images; returns width and height of those it has loaded."""
        self.page.wait_for_function(f"id => ({NODE_STATE})(id).length > 0", arg=node)
        return [(width, height) for width, height in self.page.evaluate(NODE_STATE, node)]

    def look(self, node: str) -> Image.Image:
        """Moves a node to where nothing covers it; returns what is seen of it there."""
        self.page.evaluate(SHOW_NODE, node)
        self.settle()
        x, y, width, height = self.page.evaluate(NODE_AREA, node)
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, VIEWPORT["width"]), min(y + height, VIEWPORT["height"])
        clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        return Image.open(io.BytesIO(self.page.screenshot(clip=clip)))

    def bright_pixels(self, node: str) -> int:
        """Returns how much of a node's face is as bright as an image."""
        return sum(self.look(node).convert("L").histogram()[BRIGHT:])

    def coloured_pixels(self, node: str) -> int:
        """Returns how much of a node's face has a strong colour, dark or bright; the page itself is grey."""
        return sum(self.look(node).convert("HSV").getchannel("S").histogram()[COLOURED:])

    def add(self, node_type: str) -> str:
        """Leaves one new node alone on the canvas; returns its id."""
        add = """type => {
            for (const old of [...app.graph.nodes]) app.graph.remove(old);
            const node = LiteGraph.createNode(type);
            app.graph.add(node);
            return String(node.id);
        }"""
        node: str = self.page.evaluate(add, node_type)
        self.look(node)
        return node

    def widgets_shown(self, node: str, expected: set[str]) -> set[str]:
        """Returns the names of the widgets seen on a node, waiting a little for those expected."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (shown := self._widgets_now(node)) != expected and time.monotonic() < deadline:
            self.page.wait_for_timeout(100)
        return shown

    def _widgets_now(self, node: str) -> set[str]:
        names: list[str] = self.page.evaluate(WIDGET_NAMES, node)
        if not self.vue:
            return set(names)
        face = self.page.locator(f'[data-node-id="{node}"] .lg-node-widgets')
        return {name for name in names if face.get_by_text(name, exact=True).filter(visible=True).count()}

    def choose(self, node: str, widget: str, choice: str) -> None:
        """Chooses in a node's list: with the mouse where Vue draws it, else as its arrows do."""
        now: str = self.page.evaluate(CHOOSE, [node, widget, None if self.vue else choice])
        if self.vue and now != choice:
            row = self.page.locator(f'[data-node-id="{node}"] .lg-node-widgets')
            row.get_by_text(now, exact=True).first.click()
            self.page.get_by_role("option", name=choice, exact=True).click()
        self.settle()

    def ask_for_help(self, node: str) -> Locator:
        """Clicks a node's title and then the info button above it; returns the help panel's text."""
        self.look(node)
        x, y, width, _ = self.page.evaluate(NODE_AREA, node)
        info = self.page.get_by_test_id("info-button")
        for _ in range(2):  # the first click may only close what an earlier one had opened
            if not info.is_visible():
                self.page.mouse.click(x + width / 2, y + 15)
                with suppress(TimeoutError):
                    info.wait_for(timeout=5000)
        info.click()
        self.help.wait_for()
        return self.help

    def path(self, name: str) -> Path:
        """Returns where a screenshot of this mode belongs."""
        return self.screenshots.with_name(f"{self.screenshots.name}-{self.mode}-{name}.png")

    def keep(self, name: str) -> None:
        """Saves what is on the screen."""
        self.page.screenshot(path=self.path(name))

    def keep_all(self, name: str) -> None:
        """Saves the screen with the whole graph on it."""
        self.page.evaluate(SHOW_ALL)
        self.page.wait_for_timeout(500)  # the move is animated
        self.keep(name)

    @contextmanager
    def listening(self) -> Iterator[list[str]]:
        """Gives a list that at the end holds what the console complained about inside."""
        before, heard = len(self.errors), list[str]()
        yield heard
        self.page.wait_for_timeout(300)  # complaints come a moment after their cause
        heard.extend(self.errors[before:])

    def plain(self, complaint: str) -> str:
        """Returns a complaint's first line without what differs from visit to visit."""
        line = complaint.splitlines()[0].replace(self.url, "")
        return re.sub(r"(https?://[^/\s']+)[^\s']*", r"\1", line)  # of foreign addresses the host will do

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            place = message.location["url"] if message.text.startswith("Failed to load resource") else ""
            self.errors.append(self.plain(f"{message.text} {place}".strip()))

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)

    def _post(self, path: str, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        header = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data=data, headers=header)):
            pass
