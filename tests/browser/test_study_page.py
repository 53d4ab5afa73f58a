"""The study page in a browser: a complete study with the keyboard alone, in a narrow window, offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, BrowserContext, Page, expect

from hyperalign.cli.main import main
from hyperalign.cli.study.results import rates
from hyperalign.cli.study.trials import Key, read_key
from hyperalign.cli.study.votes import read_votes
from scripts.common import BUILD

NAMES = ("apple", "boat", "cloud", "drum")
COLOURS = ("crimson", "seagreen", "royalblue", "orange")
LONG_PROMPT = "a sailing boat on a wide and quiet lake, evening light, " * 6
UNNAMED = """() => [...document.querySelectorAll("button, input")]
    .filter((one) => !(one.textContent.trim() || one.ariaLabel || one.labels?.length)).length"""
NARROW, WIDE, FLAT = (360, 740), (1280, 800), (740, 360)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The page for four names of two methods."""
    for method in ("base", "aligned"):
        (tmp_path / method).mkdir()
        for name, colour in zip(NAMES, COLOURS, strict=True):
            image = Image.new("RGB", (512, 512), "white" if method == "base" else "lavender")
            ImageDraw.Draw(image).ellipse((90, 90, 420, 420), fill=colour)
            image.save(tmp_path / method / f"{name}.png")
    (tmp_path / "prompts.txt").write_text(f"a red apple\n{LONG_PROMPT}\na blue cloud\na drum\n")
    folders = [str(tmp_path / "base"), str(tmp_path / "aligned")]
    prompts, out = str(tmp_path / "prompts.txt"), str(tmp_path / "study.html")
    assert main(["study", *folders, "--prompts", prompts, "--out", out, "--title", "Shapes"]) == 0
    return tmp_path / "study.html"


@pytest.fixture
def key(study: Path) -> Key:
    return read_key(study)


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A narrow window without a network."""
    found = browser.new_context(viewport=_size(NARROW), offline=True, color_scheme="light")
    yield found
    found.close()


@pytest.fixture
def page(context: BrowserContext, study: Path) -> Iterator[Page]:
    """The page, opened from its file; any error message or network request fails the test."""
    opened = context.new_page()
    messages: list[str] = []
    fetched: list[str] = []
    opened.on("console", lambda message: messages.append(message.text))
    opened.on("pageerror", lambda error: messages.append(str(error)))
    opened.on("request", lambda request: fetched.append(request.url.partition(":")[0]))
    opened.goto(study.as_uri())
    yield opened
    assert not messages
    assert set(fetched) <= {"file", "data", "blob"}


def _size(size: tuple[int, int]) -> dict[str, int]:
    return {"width": size[0], "height": size[1]}


def keep(page: Page, name: str) -> None:
    """Saves a screenshot."""
    (BUILD / "browser").mkdir(parents=True, exist_ok=True)
    page.screenshot(path=BUILD / "browser" / f"study-{name}.png")


def press(page: Page, key: str) -> None:
    """Presses a key when both images are shown."""
    page.wait_for_function("() => trial.hidden || ready")
    page.keyboard.press(key)


def expect_question(page: Page, pair: int, question: int) -> None:
    expect(page.locator("#count")).to_have_text(f"Pair {pair} of 4 · question {question} of 3")


def saved(page: Page, folder: Path, name: str) -> Path:
    """Presses S and returns the file that is downloaded."""
    with page.expect_download() as download:
        page.keyboard.press("s")
    assert download.value.suggested_filename.startswith("votes-")
    download.value.save_as(folder / name)
    return folder / name


def favour(page: Page, key: Key, method: str) -> None:
    """Answers one question in favour of a method, which the key reveals."""
    page.wait_for_function("() => trial.hidden || ready")
    shown = page.locator("#trial").get_attribute("data-trial")
    trial = next(trial for trial in key.trials if trial.id == shown)
    press(page, "ArrowLeft" if trial.first == method else "2")


def test_a_whole_study_with_the_keyboard_alone(page: Page, key: Key, tmp_path: Path):
    page.keyboard.type("Ada")
    page.keyboard.press("Enter")
    expect_question(page, 1, 1)
    expect(page.locator("#question")).to_have_text("Which image do you prefer given the prompt?")
    for _ in range(5):
        favour(page, key, "aligned")
    expect_question(page, 2, 3)

    press(page, "u")
    expect_question(page, 2, 2)
    favour(page, key, "base")

    prompt = page.locator("#prompt").inner_text()
    page.reload()  # in the middle
    expect_question(page, 2, 3)
    expect(page.locator("#prompt")).to_have_text(prompt)
    press(page, "0")
    for _ in range(6):
        favour(page, key, "aligned")
    expect(page.locator("#done")).to_be_visible()
    keep(page, "done")

    votes = saved(page, tmp_path, "votes.json")
    assert json.loads(votes.read_text())["name"] == "Ada"
    found = {rate.question: rate for rate in rates(read_votes([votes], key), key)}
    assert [(found[q].losses, found[q].ties, found[q].wins) for q in key.questions] == [
        (4, 0, 0),
        (3, 0, 1),
        (3, 1, 0),
    ], "of base against aligned"


def test_votes_continue_in_another_browser_in_the_same_order(
    page: Page, browser: Browser, study: Path, tmp_path: Path
):
    page.keyboard.press("Enter")
    for answer in "12012":
        press(page, answer)
    votes = saved(page, tmp_path, "votes.json")
    press(page, "0")
    prompt = page.locator("#prompt").inner_text()
    elsewhere = browser.new_context(viewport=_size(NARROW), offline=True)
    other = elsewhere.new_page()
    other.goto(study.as_uri())
    other.set_input_files("#import", votes)
    expect_question(other, 2, 3)
    press(other, "0")
    expect(other.locator("#prompt")).to_have_text(prompt)
    elsewhere.close()


def test_other_files_are_refused_with_a_message(page: Page, tmp_path: Path):
    other = {"format": "hyperalign-votes", "version": 1, "study": "0123", "rater": "r", "votes": {}}
    for content, said in (
        (json.dumps(other), "belong to the study 0123"),
        ("{}", "not a file of votes"),
        ("torn", "not JSON"),
    ):
        (tmp_path / "file.json").write_text(content)
        page.set_input_files("#import", tmp_path / "file.json")
        expect(page.locator("#notice")).to_contain_text(said)
        expect(page.locator("#start")).to_be_visible()


@pytest.mark.parametrize("size", [NARROW, WIDE, FLAT], ids=["narrow", "wide", "flat"])
def test_everything_fits_the_window(page: Page, size: tuple[int, int]):
    page.set_viewport_size(_size(size))
    name = f"{size[0]}x{size[1]}"
    keep(page, f"{name}-start")
    page.keyboard.press("Enter")
    for step in range(12):
        page.wait_for_function("() => ready")
        long = page.locator("#prompt").inner_text().startswith(LONG_PROMPT[:20])
        width, height = page.evaluate(
            "() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        )
        assert width <= size[0]
        assert height <= size[1], "no question is below the fold"
        boxes = [page.locator(".image img").nth(side).bounding_box() for side in (0, 1)]
        assert all(box and min(box["width"], box["height"]) >= 110 for box in boxes)
        assert boxes[0]["width"] == boxes[1]["width"], "neither side is favoured"
        if step % 3 == 0:
            page.wait_for_timeout(300)  # the question is animated
            keep(page, f"{name}-{'long' if long else 'trial'}")
        press(page, "0")


def test_up_and_down_choose_only_where_the_images_are_stacked(page: Page):
    page.keyboard.press("Enter")
    press(page, "ArrowDown")
    expect_question(page, 1, 2)
    page.set_viewport_size(_size(WIDE))
    press(page, "ArrowDown")
    expect_question(page, 1, 2)
    press(page, "ArrowRight")
    expect_question(page, 1, 3)


def test_held_keys_and_open_dialogs_answer_nothing(page: Page):
    page.keyboard.press("Enter")
    page.wait_for_function("() => ready")
    page.keyboard.down("1")
    page.keyboard.down("1")
    page.keyboard.down("1")
    page.keyboard.up("1")
    expect_question(page, 1, 2)
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    keep(page, "help")
    page.keyboard.press("2")
    page.keyboard.press("Escape")
    expect_question(page, 1, 2)
    page.keyboard.press("z")
    expect(page.locator("#zoom-title")).to_have_text("First image")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#zoom-title")).to_have_text("Second image")
    keep(page, "zoom")
    page.keyboard.press("Escape")
    expect_question(page, 1, 2)


def test_it_works_with_tab_and_enter_and_is_announced(page: Page):
    page.keyboard.press("Enter")
    page.wait_for_function("() => ready")
    reached: list[str] = []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("() => document.activeElement.innerText || document.activeElement.ariaLabel")
        )
        ring = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none", reached[-1]
        if "No difference" in reached[-1]:
            break
    page.keyboard.press("Enter")
    expect_question(page, 1, 2)
    expect(page.get_by_role("status")).to_contain_text("Which image is more visually appealing?")
    expect(page.get_by_role("img", name="First image")).to_be_visible()
    expect(page.get_by_role("progressbar", name="Answers given")).to_have_attribute("value", "1")
    assert page.evaluate(UNNAMED) == 0


def test_the_next_person_starts_from_the_beginning(page: Page):
    page.on("dialog", lambda dialog: dialog.accept())
    page.keyboard.press("Enter")
    for _ in range(12):
        press(page, "0")
    first = page.evaluate("() => state.rater")
    page.get_by_role("button", name="Next person").press("Enter")
    expect(page.locator("#start")).to_be_visible()
    page.keyboard.press("Enter")
    expect_question(page, 1, 1)
    assert page.evaluate("() => state.rater") != first


def test_a_browser_without_storage_shows_a_message(context: BrowserContext, page: Page, study: Path):
    refusing = context.new_page()
    refusing.add_init_script("Storage.prototype.setItem = () => { throw new Error('full'); }")
    refusing.goto(study.as_uri())
    refusing.keyboard.press("Enter")
    press(refusing, "1")
    expect(refusing.locator("#notice")).to_contain_text("save your votes before you close")
    expect_question(refusing, 1, 2)
