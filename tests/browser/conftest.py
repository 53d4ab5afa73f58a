"""Debian's Chromium, a ComfyUI with the pack and one without, and the page in both ways to draw nodes."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from scripts.browser import browser_is_required, find_browser
from scripts.common import BUILD
from scripts.environment import venv_python
from scripts.host import Server
from scripts.host_tree import comfyui_tree

sys.path.append(str(Path(__file__).parent))  # front_end.py
from front_end import PACK, FrontEnd

# Nothing outside this machine is asked for anything.
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SWITCHES += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
PLACE = {"size": [270, 250], "flags": {}, "order": 0, "mode": 0, "properties": {}}
IMAGE = {"name": "images", "type": "IMAGE"}
CORE_WORKFLOW = {
    "last_node_id": 2,
    "last_link_id": 1,
    "nodes": [
        {"id": 1, "type": "EmptyImage", "pos": [400, 300], "outputs": [IMAGE | {"links": [1]}], **PLACE},
        {"id": 2, "type": "PreviewImage", "pos": [750, 300], "inputs": [IMAGE | {"link": 1}], **PLACE},
    ],
    "links": [[1, 1, 0, 2, 0, "IMAGE"]],
    "version": 0.4,
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts these tests last: until the session ends, Playwright's loop keeps asyncio.run from others."""
    items.sort(key=lambda item: Path(__file__).parent in item.path.parents)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests."""
    executable = find_browser()
    if executable is None:
        say = pytest.fail if browser_is_required() else pytest.skip
        say("there is no Chromium: `python3 scripts/test.py` installs it where it may")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=SWITCHES)
        yield running
        running.close()


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    return comfyui_tree(venv_python() if venv_python().exists() else Path(sys.executable))


@pytest.fixture(scope="session")
def screenshots(comfyui_path: Path) -> Path:
    """How the names of all screenshots begin."""
    version = (comfyui_path / "comfyui_version.py").read_text(encoding="utf-8").split('"')[1]
    folder = BUILD / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / version


@pytest.fixture(scope="session")
def bare_errors(browser: Browser, comfyui_path: Path, worker_id: str, screenshots: Path) -> set[str]:
    """What the console complains about when the same things are done in a ComfyUI without any pack."""
    errors: set[str] = set()
    with Server(comfyui_path, f"bare-{worker_id}", with_pack=False) as server:
        for vue in (False, True):
            front = FrontEnd(browser, server.url, vue, screenshots.with_name(f"{screenshots.name}-bare"))
            front.open()
            front.templates_button.click()
            front.dialog.first.wait_for()
            front.close_dialogs()
            front.load(CORE_WORKFLOW)
            front.run()
            front.images("2")
            front.keep("ran")
            errors |= set(front.errors)
            front.page.close()
    return errors


@pytest.fixture(scope="session")
def server(comfyui_path: Path, worker_id: str, bare_errors: set[str]) -> Iterator[Server]:
    """One server with the pack, started when the bare one has ended."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as in tests/host
    with Server(comfyui_path, f"browser-{worker_id}") as running:
        yield running


@pytest.fixture(scope="session")
def pack(server: Server) -> Path:
    """The pack as the server has it: a copy, made when it started."""
    return server.base / "custom_nodes" / PACK


@pytest.fixture(scope="session", params=[False, True], ids=["canvas", "vue"])
def tab(
    request: pytest.FixtureRequest, browser: Browser, server: Server, screenshots: Path
) -> Iterator[FrontEnd]:
    """The page, opened once per way to draw nodes."""
    front = FrontEnd(browser, server.url, request.param, screenshots)
    front.open()
    yield front
    front.page.close()


@pytest.fixture
def front(tab: FrontEnd) -> FrontEnd:
    """The page with nothing over its canvas."""
    tab.close_dialogs()
    return tab
