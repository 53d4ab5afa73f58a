"""The score command: complete, interrupted and repeated runs, and the inputs it refuses."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import stats

from hyperalign.cli import main as command
from hyperalign.cli.common import batches
from hyperalign.cli.common.batches import batches_of_one_size
from hyperalign.cli.score.scoring import Scored
from hyperalign.cli.score.sheet import contact_sheet
from hyperalign.cli.score.tables import ranking_scores
from hyperalign.image_files import BadImage, decode, open_rgb
from hyperalign.rewards import loading

TINY, VALIDATION = "tiny reward", "tiny validation reward"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images in three sizes, one of them in a folder of its own, and a table of prompts."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    rows = [("name", "prompt")]
    for index in range(10):
        color, size = COLORS[index % 8], ((64, 64), (96, 48), (40, 80))[index % 3]
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).ellipse((8, 8, 38, 38), fill=color)
        name = f"{'more/' if index == 9 else ''}{index}.{'jpg' if index == 4 else 'png'}"
        image.save(folder / name)
        rows.append((name, f"a {color} circle"))
    with (tmp_path / "prompts.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return folder


def run(folder: Path, *more: str, reward: str = TINY, batch: str = "3") -> int:
    prompts = ["--prompts", f"{folder.parent}/prompts.csv"]
    common = ["--reward", reward, "--batch", batch, "--device", "cpu"]
    return command.main(["score", str(folder), *common, *prompts, *more])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def expected(folder: Path, rows: list[dict[str, str]], reward: str = TINY) -> list[float]:
    """The scores of each image alone, with none of the command's code but the reward."""
    model = loading.load(reward, folder)
    scores: list[float] = []
    for row in rows:
        pixels_HWC = np.asarray(Image.open(folder / row["name"]).convert("RGB"), dtype=np.float32) / 255
        image_BCHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
        with torch.no_grad():
            scores += model.score(image_BCHW, [row["prompt"]]).tolist()
    return scores


def test_every_image_has_the_score_it_has_alone(folder: Path) -> None:
    assert run(folder, "--reward", VALIDATION) == 0
    rows = table(folder / "scores.csv")
    assert [row["name"] for row in rows] == [f"{i}.{'jpg' if i == 4 else 'png'}" for i in range(9)] + [
        "more/9.png"
    ]
    for reward in (TINY, VALIDATION):
        assert [float(row[reward]) for row in rows] == pytest.approx(expected(folder, rows, reward), abs=1e-4)
    assert sum(float(row["mean z-score"]) for row in rows) == pytest.approx(0.0, abs=1e-6)


def test_parquet_holds_the_same_table(folder: Path, tmp_path: Path) -> None:
    assert run(folder) == run(folder, "--out", str(tmp_path / "out/s.parquet")) == 0
    read = pyarrow.parquet.read_table(tmp_path / "out/s.parquet").to_pylist()
    rows = table(folder / "scores.csv")
    assert [(row["name"], row["prompt"]) for row in read] == [(row["name"], row["prompt"]) for row in rows]
    assert [row[TINY] for row in read] == pytest.approx([float(row[TINY]) for row in rows], abs=1e-5)


def test_bad_images_are_counted_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "3.png").write_bytes(b"not an image")
    whole = (folder / "5.png").read_bytes()
    (folder / "5.png").write_bytes(whole[: len(whole) // 2])
    assert run(folder, "--sheet", str(folder / "sheet.html")) == 0
    said = capsys.readouterr()
    assert "2 images were skipped" in said.out
    assert re.findall(r"skipped (\S+):", said.err) == ["3.png", "5.png"]
    assert len(table(folder / "scores.csv")) == 8
    assert "2 images were skipped" in (folder / "sheet.html").read_text(encoding="utf-8")


def test_an_interrupted_run_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def interrupted(place: Path, name: str) -> torch.Tensor | BadImage:
        decoded.append(name)
        if len(decoded) == 8:
            raise KeyboardInterrupt
        return decode(place, name)

    monkeypatch.setattr(batches, "decode", interrupted)
    assert run(folder, "--threads", "1", "--batch", "1") == command.INTERRUPTED
    assert not (folder / "scores.csv").exists()
    log = folder / ".scores.csv.log.jsonl"
    kept = {json.loads(line)["name"] for line in log.read_text().splitlines()[1:]}
    assert 0 < len(kept) < 8
    with log.open("a") as stream:
        stream.write('{"name": "7.png", "sco')  # as after a power failure
    assert run(folder) == 0
    assert not kept & set(decoded[8:])
    assert len(table(folder / "scores.csv")) == 10
    assert [float(row[TINY]) for row in table(folder / "scores.csv")] == pytest.approx(
        expected(folder, table(folder / "scores.csv")), abs=1e-4
    )


def test_a_second_run_scores_only_what_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(folder) == 0
    before = table(folder / "scores.csv")
    Image.new("RGB", (64, 64), "black").save(folder / "2.png")
    prompts = folder.parent / "prompts.csv"
    prompts.write_text(prompts.read_text().replace("1.png,a orange circle", "1.png,a blue circle"))
    scored: list[str] = []

    def noted(place: Path, name: str) -> torch.Tensor | BadImage:
        scored.append(name)
        return decode(place, name)

    monkeypatch.setattr(batches, "decode", noted)
    assert run(folder) == 0
    assert sorted(scored) == ["1.png", "2.png"]
    after = table(folder / "scores.csv")
    assert [a["name"] for a, b in zip(after, before, strict=True) if a != b] == ["1.png", "2.png"]


def test_a_killed_process_loses_no_finished_batch(folder: Path) -> None:
    """The real command, whose process ends once its log has images."""
    code = (
        "import os, sys; from hyperalign.cli import main as c; from hyperalign.cli.common.log import Log\n"
        "append = Log.append\n"
        "def last(log, rows): append(log, rows); len(log.rows) >= 4 and os._exit(9)\n"
        "Log.append = last; c.main(['score', *sys.argv[1:]])"
    )
    arguments = [str(folder), "--reward", TINY, "--prompt", "a red circle", "--batch", "2", "--device", "cpu"]
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, check=False).returncode == 9
    lines = (folder / ".scores.csv.log.jsonl").read_text().splitlines()
    assert len(lines) >= 5
    assert command.main(["score", *arguments]) == 0
    assert (folder / ".scores.csv.log.jsonl").read_text().splitlines()[: len(lines)] == lines


def test_scores_of_other_settings_are_not_mixed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    assert run(folder, reward=VALIDATION) == 2
    assert "rewards ['tiny reward'] instead of ['tiny validation reward']" in capsys.readouterr().err


Refusal = Callable[[Path], list[str]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda f: [str(f / "none"), "--prompt", "x", "--reward", TINY], "There is no folder"),
        (lambda f: [str(f / "empty"), "--prompt", "x", "--reward", TINY], "There is no image below"),
        (lambda f: [str(f), "--prompt", "x", "--reward", "beauty"], "There is no reward 'beauty'; expected"),
        (lambda f: [str(f), "--prompt", "x", "--reward", TINY, "--reward", TINY], "give each of them once"),
        (
            lambda f: [str(f), "--prompt", "x", "--reward", "clip", "--weights", str(f)],
            "There is no model",
        ),
        (lambda f: [str(f), "--prompt", "xylophone", "--reward", TINY], "the word 'xylophone'"),
        (lambda f: [str(f), "--prompts", "comfyui", "--reward", TINY], "prompts for 0 of them in comfyui"),
        (
            lambda f: [str(f), "--prompts", "txt", "--reward", TINY],
            "one: 0.png, 1.png, 2.png and 7",
        ),
        (lambda f: [str(f), "--prompts", "p.doc", "--reward", TINY], "expected a .csv or .jsonl file"),
        (
            lambda f: [str(f), "--prompt", "x", "--reward", TINY, "--out", "s.xls"],
            "ending in .csv or",
        ),
        (lambda f: [str(f), "--prompt", "x", "--reward", TINY, "--device", "abacus"], "no device 'abacus'"),
        (
            lambda f: [str(f), "--prompt", "x", "--reward", TINY, "--out", str(f / "0.png/s.csv")],
            "cannot be written",
        ),
    ],
)
def test_bad_inputs_are_one_sentence_before_anything_is_written(
    folder: Path, arguments: Refusal, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    before = sorted(folder.rglob("*"))
    assert command.main(["score", *arguments(folder)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(folder.rglob("*")) == before


def test_a_folder_of_nothing_but_bad_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert (
        command.main(["score", str(tmp_path), "--prompt", "a dog", "--reward", TINY, "--device", "cpu"]) == 2
    )
    assert "None of the 1 images could be scored; a.png: it cannot be decoded" in capsys.readouterr().err


def test_a_network_reads_its_weights_from_the_folder(folder: Path, published: Callable[[str], Path]) -> None:
    assert run(folder, "--weights", str(published("clip")), reward="clip") == 0
    assert all(-1 <= float(row["clip"]) <= 1 for row in table(folder / "scores.csv"))


def test_images_are_read_as_a_viewer_shows_them(tmp_path: Path) -> None:
    Image.new("I;16", (2, 1), 32768).save(tmp_path / "grey16.png")
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2, 1), "red").save(tmp_path / "rotated.jpg", exif=exif)
    assert open_rgb(tmp_path / "grey16.png").getpixel((0, 0)) == (127, 127, 127)
    assert open_rgb(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_rgb(tmp_path / "rotated.jpg").size == (1, 2)
    pixels = decode(tmp_path, "rotated.jpg")
    assert isinstance(pixels, torch.Tensor)
    assert pixels.shape == (3, 2, 1)


@settings(max_examples=50)
@given(st.lists(st.sampled_from([(2, 2), (2, 3), (3, 2), (9, 1), (1, 1)])), st.integers(1, 5))
def test_batches_have_every_image_once_and_one_size_each(sizes: list[tuple[int, int]], batch: int) -> None:
    images = [(str(i), torch.zeros(3, *size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    batches = list(batches_of_one_size(images, batch))
    assert sorted(int(name) for group in batches for name, _ in group) == list(range(len(sizes)))
    assert all(len(group) <= batch and len({p.shape for _, p in group}) == 1 for group in batches)


def test_few_images_wait_even_if_no_two_have_one_size() -> None:
    taken = 0

    def images() -> object:
        nonlocal taken
        for taken in range(1, 200):
            yield str(taken), torch.zeros(3, 1, taken, dtype=torch.uint8)

    first = next(iter(batches_of_one_size(images(), 4)))  # type: ignore[arg-type]
    assert len(first) == 1
    assert taken <= 4 * batches.WAITING_BATCHES


def test_large_images_make_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_PIXELS", 250)
    images = [(str(i), torch.zeros(3, 10, 10, dtype=torch.uint8)) for i in range(5)]
    assert [len(group) for group in batches_of_one_size(images, 16)] == [2, 2, 1]
    huge = [("huge", torch.zeros(3, 30, 30, dtype=torch.uint8))]
    assert [len(group) for group in batches_of_one_size(huge, 16)] == [1]


def scored(name: str, *scores: float, prompt: str = "p") -> Scored:
    return Scored(name, prompt, {f"r{i}": score for i, score in enumerate(scores)}, 0, 0)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.floats(0.1, 10), st.floats(-9, 9))
def test_the_ranking_of_several_rewards_does_not_depend_on_their_units(
    scores: list[float], scale: float, offset: float
) -> None:
    scores = [round(score, 2) for score in scores]
    one = ranking_scores([scored("x", s, -s / 2 + i) for i, s in enumerate(scores)])
    two = ranking_scores([scored("x", scale * s + offset, -s / 2 + i) for i, s in enumerate(scores)])
    assert one == pytest.approx(two, abs=1e-6)


class Page(HTMLParser):
    """The images, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.images += [found["alt"] or ""] if tag == "img" else []
        links = (value for key, value in attrs if key in ("src", "href") and value)
        self.links += [link for link in links if not link.startswith("data:image/jpeg;base64,")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_sheet_shows_the_best_first_and_loads_no_other_file(folder: Path) -> None:
    sheet = folder / "sheet.html"
    assert run(folder, "--sheet", str(sheet), "--sheet-images", "4") == 0
    page = Page(sheet.read_text(encoding="utf-8"))
    rows = sorted(table(folder / "scores.csv"), key=lambda row: -float(row[TINY]))
    assert page.images == [row["name"] for row in rows[:4]]
    assert page.links == []
    assert "10 images scored; the best 4 of them" in page.text


def test_prompts_and_names_are_escaped_in_html() -> None:
    attack = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
    text = contact_sheet(attack, [scored(attack, 1.0, 2.0, prompt=attack)], {attack: "data:,"}, [])
    page = Page(text)
    assert page.images == [attack]
    assert "<script>alert" not in text
    assert page.text.count(attack) >= 3


@given(st.lists(st.lists(st.integers(-500, 500), min_size=3, max_size=3), min_size=2, max_size=8))
def test_the_ranking_is_the_mean_of_scipys_z_scores(table: list[list[int]]) -> None:
    """A reward that is equal for all images contributes nothing."""
    scores_NR = np.array(table) / 100
    varying = [column_N for column_N in scores_NR.T if len(set(column_N)) > 1]
    expected = sum((stats.zscore(column_N) for column_N in varying), np.zeros(len(table))) / 3
    found = ranking_scores([scored("x", *row) for row in scores_NR.tolist()])
    assert found == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_progress_bar_counts_images_and_starts_where_the_log_ends(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder) == 0
    Image.new("RGB", (64, 64), "black").save(folder / "2.png")
    capsys.readouterr()
    assert run(folder) == 0
    shown = capsys.readouterr().err
    assert "scoring:  90%" in shown
    assert "10/10" in shown
