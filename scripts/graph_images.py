"""Makes the images of graphs for the help pages, and the thumbnails of the template browser.

`python3 scripts/graph_images.py` runs the tiny model's workflows in ComfyUI's own page in Chromium. Their
thumbnails show the generated images; that of a workflow for a large model shows its graph. `NAME ...` makes
only those of the named workflows.
"""

from __future__ import annotations

import io
import json
import math
import sys
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

from hyperalign.errors import HyperAlignError
from scripts.browser import ensure_browser
from scripts.common import ROOT, ScriptError, say
from scripts.environment import enter_environment
from scripts.host import Server, exit_on_termination

if TYPE_CHECKING:
    from PIL.Image import Image
    from playwright.sync_api import APIResponse, Page

Workflow = dict[str, Any]
WORKFLOWS = ROOT / "example_workflows"
IMAGES = ROOT / "web" / "docs" / "images"
TINY = "HyperAlignTinyModel"
NOTE = "MarkdownNote"
# The workflow that shows a node in use.
HELP = {
    "HyperAlignApply": "first_steps",
    "HyperAlignBestOfN": "best_of_n",
    "HyperAlignCompare": "compare_base_aligned",
    "HyperAlignExportLora": "export_lora",
    "HyperAlignGuidance": "reward_guidance",
    "HyperAlignLoader": "first_steps",
    "HyperAlignRewardLoader": "select_by_reward",
    "HyperAlignRewardScore": "score_rewards",
    "HyperAlignSampler": "base_versus_aligned",
    "HyperAlignSelect": "select_by_reward",
    "HyperAlignStrength": "strength_curve",
    "HyperAlignTinyLatent": "first_steps",
    "HyperAlignTinyModel": "first_steps",
    "HyperAlignTrace": "trace",
    "HyperAlignTracePca": "trace_pca",
}
# Nodes whose images make a thumbnail, a row each, where not every node with images does.
SHOWING = {
    "compare_base_aligned": ["13"],
    "score_rewards": ["11", "14"],
    "select_by_reward": ["11", "12"],
    "strength_curve": ["11"],
    "trace": ["8"],
}
MOST_BYTES = 58_000
MARGIN = 24
SCALE = 0.8
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no connection leaves this machine
)
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
}
GRAPH_ALONE = (
    "* {visibility: hidden} #graph-canvas, .dom-widget, .dom-widget * {visibility: visible !important}"
)
READY = "() => window.app?.graph?.nodes && window.app.canvas"
# Leaves only the given nodes on the canvas. They stay where they are, or stand in columns.
SHOW = """([columns, arrange, margin, scale]) => {
    const known = new Map(app.graph.nodes.map(node => [node.id, node])), area = app.canvas.ds;
    const kept = columns.flat();
    for (const [id, node] of known) if (!kept.includes(id)) app.graph.remove(node);
    for (const group of [...app.graph.groups]) app.graph.remove(group);
    let x = 0;
    for (const column of arrange ? columns : []) {
        let y = 0, width = 0;
        for (const node of column.map(id => known.get(id))) {
            const least = node.computeSize()[1], images = app.nodeOutputs[node.id]?.images;
            const grows = images || node.widgets?.some(widget => widget.element);
            const needed = least + (images ? 220 : 0);
            node.setSize([node.size[0], grows ? Math.max(needed, node.size[1]) : least]);
            node.pos = [x, y];
            y += node.size[1] + 60;
            width = Math.max(width, node.size[0]);
        }
        x += width + 80;
    }
    app.canvas.draw(true, true);
    const edges = kept.map(id => [...known.get(id).boundingRect]);
    const left = Math.min(...edges.map(e => e[0])), top = Math.min(...edges.map(e => e[1]));
    const right = Math.max(...edges.map(e => e[0] + e[2])), bottom = Math.max(...edges.map(e => e[1] + e[3]));
    area.scale = scale;
    area.offset = [margin - left, margin - top];
    app.canvas.setDirty(true, true);
    const screen = app.canvas.canvas.getBoundingClientRect();
    const width = (right - left + 2 * margin) * scale, height = (bottom - top + 2 * margin) * scale;
    return {x: screen.x, y: screen.y, width, height};
}"""


class Editor:
    """ComfyUI's page in Chromium."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        page.request.post(f"{url}/settings", data=SETTINGS, fail_on_status_code=True)
        page.goto(url)
        page.wait_for_function(READY)

    def load(self, workflow: Workflow) -> None:
        """Puts a workflow on the canvas."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_timeout(500)

    def run(self) -> dict[str, list[Image]]:
        """Runs what is on the canvas; returns the images by node id.

        Raises:
            ScriptError: the run failed.
        """
        known = set(self._get("/history").json())
        self.page.evaluate("() => app.queuePrompt(0)")
        while not (new := self._get("/history").json().keys() - known):
            self.page.wait_for_timeout(200)
        result = self._get(f"/history/{new.pop()}").json().popitem()[1]
        if result["status"]["status_str"] != "success":
            raise ScriptError(f"The run failed: {result['status']['messages']}")
        self.page.wait_for_timeout(1000)  # its images reach the canvas
        outputs = {node: output.get("images", []) for node, output in result["outputs"].items()}
        return {node: [self._image(each) for each in found] for node, found in outputs.items() if found}

    def graph(self, columns: list[list[int]]) -> Image:
        """Returns an image of some nodes and their links, in columns if there are several."""
        from PIL import Image

        area = self.page.evaluate(SHOW, [columns, len(columns) > 1, MARGIN, SCALE])
        right, bottom = area["x"] + area["width"], area["y"] + area["height"]
        self.page.set_viewport_size({"width": math.ceil(right), "height": math.ceil(bottom)})
        style = self.page.add_style_tag(content=GRAPH_ALONE)
        self.page.wait_for_timeout(500)
        image = Image.open(io.BytesIO(self.page.screenshot(clip=area))).convert("RGB")
        style.evaluate("style => style.remove()")
        return image

    def _image(self, reference: dict[str, str]) -> Image:
        from PIL import Image

        return Image.open(io.BytesIO(self._get("/view", urllib.parse.urlencode(reference)).body())).convert(
            "RGB"
        )

    def _get(self, path: str, query: str = "") -> APIResponse:
        return self.page.request.get(self.url + path, params=query, fail_on_status_code=True)


def neighbourhood(workflow: Workflow, node_type: str) -> list[list[int]]:
    """Returns the ids of what leads to the first node of a type, of itself, and of what follows it."""
    node = next(node["id"] for node in workflow["nodes"] if node["type"] == node_type)
    before = {source for _, source, _, target, _, _ in workflow["links"] if target == node}
    after = {target for _, source, _, target, _, _ in workflow["links"] if source == node}
    return [column for column in (sorted(before), [node], sorted(after)) if column]


def contact_sheet(rows: list[list[Image]]) -> Image:
    """Returns the images in rows, enlarged by a whole factor to 512 pixels or more.

    A lone row is folded.
    """
    from PIL import Image

    if len(rows) == 1:
        columns = math.ceil(math.sqrt(len(rows[0])))
        rows = [rows[0][at : at + columns] for at in range(0, len(rows[0]), columns)]
    gap = 4
    width = max(sum(each.width + gap for each in row) for row in rows) - gap
    height = sum(max(each.height for each in row) + gap for row in rows) - gap
    sheet, y = Image.new("RGB", (width, height), "white"), 0
    for row in rows:
        x = (width - sum(each.width + gap for each in row) + gap) // 2
        for each in row:
            sheet.paste(each, (x, y))
            x += each.width + gap
        y += max(each.height for each in row) + gap
    factor = math.ceil(512 / max(sheet.size))
    return sheet.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def save_small(image: Image, path: Path, widest: int) -> None:
    """Writes an image without metadata, below the size that the pack allows itself."""
    from PIL import Image

    if image.width > widest:
        height = round(image.height * widest / image.width)
        image = image.resize((widest, height), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    for quality in range(92, 20, -6):
        image.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            break
    say(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, {path.stat().st_size} bytes")


def image_workflow(editor: Editor, path: Path) -> None:
    """Writes a workflow's thumbnail and the help images that it serves."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    runs = any(node["type"] == TINY for node in workflow["nodes"])
    editor.load(workflow)
    if runs:
        images = editor.run()
        shown = SHOWING.get(path.stem) or sorted(images, key=int)
        thumbnail = contact_sheet([images[node] for node in shown])
    else:
        thumbnail = editor.graph([[node["id"] for node in workflow["nodes"] if node["type"] != NOTE]])
    save_small(thumbnail, path.with_suffix(".jpg"), 768)
    for node_type in (node_type for node_type, name in HELP.items() if name == path.stem):
        editor.load(workflow)
        if runs:
            editor.run()  # from ComfyUI's cache: only restores the images in the nodes
        image = editor.graph(neighbourhood(workflow, node_type))
        save_small(image, IMAGES / f"{node_type}.webp", 1200)


def main(names: list[str]) -> int:
    """Makes all images, or those of the named workflows; returns the process's exit status."""
    exit_on_termination()
    try:
        tree = enter_environment(Path(__file__).resolve())
        from playwright.sync_api import sync_playwright  # only inside the environment

        paths = [WORKFLOWS / f"{name}.json" for name in names] or sorted(WORKFLOWS.glob("*.json"))
        with Server(tree, "images") as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=ensure_browser(), args=[*SWITCHES])
            editor = Editor(browser.new_page(viewport={"width": 1600, "height": 1000}), server.url)
            for path in paths:
                image_workflow(editor, path)
    except (ScriptError, HyperAlignError, OSError) as error:
        say(f"Error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
