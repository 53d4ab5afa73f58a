"""`train/evaluate.py` on drawn images with the tiny model's scorers: table, processes, resuming, page."""

from __future__ import annotations

import base64
import csv
import io
import json
import multiprocessing
import os
import re
import shutil
import socket
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image, ImageDraw

from hyperalign.geneval.summary import summarise
from hyperalign.image_sets import RunRecord, Seconds, Settings, write_metadata, write_record
from hyperalign.rewards import loading
from hyperalign.tiny.evaluators import load_detector
from hyperalign.tiny.geneval import is_correct
from hyperalign.tiny.prompts import content_of
from train import evaluate
from train.evaluation import scoring

TINY, VALIDATION = "tiny reward", "tiny validation reward"
LEFT, RIGHT = (6, 20, 28, 42), (36, 20, 58, 42)
SCENES = {
    "a red circle": [("red", "circle", LEFT)],
    "an icon of a blue square": [("blue", "square", LEFT)],
    "two green circles": [("green", "circle", LEFT), ("green", "circle", RIGHT)],
    "a red circle and a blue square": [("red", "circle", LEFT), ("blue", "square", RIGHT)],
    "a blue square left of a red circle": [("blue", "square", LEFT), ("red", "circle", RIGHT)],
    "a dog": [("brown", "circle", LEFT)],
}
PROMPTS, SEEDS = list(SCENES), 2


def draw(shapes: list[Any], seed: int) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(image)
    for color, kind, box in shapes:
        place = [edge + 3 * seed for edge in box]
        (pen.ellipse if kind == "circle" else pen.rectangle)(place, fill=color)
    return image


def write_set(folder: Path, missing: int, seconds: float | None) -> Path:
    """Draws every prompt; the first ones lack a shape, so that rewards and GenEval differ between sets."""
    write_metadata(folder, [{"prompt": prompt} for prompt in PROMPTS])
    for number, prompt in enumerate(PROMPTS):
        (folder / f"{number:05d}" / "samples").mkdir(exist_ok=True)
        shapes = SCENES[prompt][1:] if number < missing else SCENES[prompt]
        for seed in range(SEEDS):
            draw(shapes, seed).save(folder / f"{number:05d}" / "samples" / f"{seed:04d}.png")
    if seconds is not None:
        settings = Settings(
            base="tiny", base_files="", method="S", method_file="tiny_s.safetensors", method_sha256="",
            options={}, steps=4, guidance_scale=1.0, width=64, height=64, seed=0, images_per_prompt=SEEDS,
            prompts=len(PROMPTS), prompts_sha256="",
        )  # fmt: skip
        write_record(folder, RunRecord(settings, True, Seconds(seconds, seconds, seconds, 12)))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three sets; the middle one comes from another program, which left no record."""
    folder = tmp_path_factory.mktemp("images")
    return {
        "base": write_set(folder / "base", 5, 2.0),
        "foreign": write_set(folder / "foreign", 3, None),
        "s": write_set(folder / "s", 0, 0.5),
    }


def arguments(sets: dict[str, Path], out: Path, *more: str) -> list[str]:
    named = [f"{name}={folder}" for name, folder in sets.items()]
    rewards = ["--rewards", TINY, VALIDATION]
    return ["--sets", *named, "--out", str(out), *rewards, "--batch", "5", "--cpu", *more]


@pytest.fixture(scope="module")
def report(sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    torch.set_num_threads(1)
    assert evaluate.main(arguments(sets, out)) == 0
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def pixels(folder: Path) -> torch.Tensor:
    """Returns all images of a set (P * S, 3, H, W), with none of the command's code."""
    paths = sorted(folder.glob("*/samples/*.png"))
    arrays = [np.asarray(Image.open(path), dtype=np.float32) / 255 for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def test_the_table_has_the_means_of_scores_computed_on_their_own(
    sets: dict[str, Path], report: Path, recomputed: Any
) -> None:
    table = {row["method"]: row for row in rows(report / "table.csv")}
    assert list(table) == ["base", "foreign", "s"]
    texts = [prompt for prompt in PROMPTS for _ in range(SEEDS)]
    contents = [content_of(text) for text in texts]
    for name, folder in sets.items():
        images = pixels(folder)
        for reward in (TINY, VALIDATION):
            expected = loading.load(reward, folder).score(images, texts)
            rounding = 1e-5 * float(expected.abs().max())  # of each score, which the mean may be far below
            mean = pytest.approx(float(expected.double().mean()), abs=rounding)
            assert float(table[name][reward]) == mean, (name, reward)
        marks = [is_correct(*pair) for pair in zip(contents, load_detector().detect(images), strict=True)]
        summary = summarise((c.family, t, m) for c, t, m in zip(contents, texts, marks, strict=True))
        assert float(table[name]["GenEval"]) == pytest.approx(summary.task_mean)
        assert float(table[name]["GenEval, image-weighted"]) == pytest.approx(summary.image_weighted)
        for family, (correct, count) in summary.tasks.items():
            assert float(table[name][family.replace("_", " ")]) == pytest.approx(correct / count)
        embeddings = loading.load(VALIDATION, folder).embed_images(images).view(len(PROMPTS), SEEDS, -1)
        distances = 1 - (embeddings[:, 0] * embeddings[:, 1]).sum(dim=-1)
        assert float(table[name]["diversity"]) == recomputed(float(distances.mean()))
    assert float(table["s"]["GenEval"]) > float(table["base"]["GenEval"])
    assert [table[name]["s/image"] for name in table] == ["2.0", "", "0.5"]


def test_the_intervals_are_those_of_resampled_prompts(report: Path) -> None:
    scores = {(r["method"], int(r["prompt index"]), int(r["seed index"])): float(r[TINY])
              for r in rows(report / "images.csv")}  # fmt: skip
    changes = np.array(
        [np.mean([scores["s", p, k] - scores["base", p, k] for k in range(SEEDS)]) for p in range(6)]
    )
    draws = np.random.default_rng(7).integers(0, 6, (200_000, 6))
    low, high = np.percentile(changes[draws].mean(axis=1), [2.5, 97.5])
    row = rows(report / "table.csv")[2]
    assert float(row[f"{TINY} difference"]) == pytest.approx(changes.mean())
    # 4000 resamples know the ends of the interval to some hundredths of its width.
    assert float(row[f"{TINY} low"]) == pytest.approx(low, abs=0.06 * (high - low))
    assert float(row[f"{TINY} high"]) == pytest.approx(high, abs=0.06 * (high - low))
    assert rows(report / "table.csv")[0][f"{TINY} difference"] == ""


def test_markdown_prints_the_best_of_each_column_in_bold(report: Path) -> None:
    lines = [line.strip("| ").split(" | ") for line in (report / "table.md").read_text().splitlines()]
    header, _, *methods = lines[:5]
    table = rows(report / "table.csv")
    for place, name in enumerate(header[1:], 1):
        values = [float(row[name]) if row[name] else None for row in table]
        known = [value for value in values if value is not None]
        best = min(known) if name == "s/image" else max(known)
        bold = [method[place].startswith("**") if place < len(method) else False for method in methods]
        assert bold == [value == best for value in values], name


class Images(HTMLParser):
    """Notes the images of a page, and whether each tag that opens is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.found.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_every_image_beside_those_of_the_other_methods(
    sets: dict[str, Path], report: Path, tmp_path: Path
) -> None:
    page = Images()
    text = (report / "report.html").read_text(encoding="utf-8")
    page.feed(text)
    assert page.open == []
    assert not re.search(r'(src|href)="(?!data:)', text)  # needs no other file and no network
    titles = [image["title"] for image in page.found]
    assert titles == [f"{name}, {p:05d}/0000.png" for p in range(6) for name in sets]
    for image in page.found:
        name, place = image["title"].split(", ")
        number, file = place.split("/")
        shown = Image.open(io.BytesIO(base64.b64decode(image["src"].partition("base64,")[2])))
        drawn = Image.open(sets[name] / number / "samples" / file)
        assert np.abs(np.asarray(shown, float) - np.asarray(drawn, float)).mean() < 6
    shutil.copytree(report, tmp_path / "copy")
    assert evaluate.main(arguments(sets, tmp_path / "copy", "--grid-seeds", "9", "--grid-prompts", "2")) == 0
    page = Images()
    page.feed((tmp_path / "copy" / "report.html").read_text(encoding="utf-8"))
    assert len(page.found) == 2 * SEEDS * len(sets)


def reports(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def _evaluate(rank: int, port: str, given: list[str], status: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    status.put(evaluate.main(given))
    torch.distributed.destroy_process_group()


def in_two_processes(given: list[str]) -> list[int]:
    """Runs the command as `accelerate launch` with two processes does; returns the exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    status = fork.Queue()
    processes = [fork.Process(target=_evaluate, args=(rank, port, given, status)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = [status.get(timeout=400) for _ in processes]
    for process in processes:
        process.join(60)
    return found


def test_two_processes_write_exactly_what_one_does(
    sets: dict[str, Path], report: Path, tmp_path: Path
) -> None:
    assert in_two_processes(arguments(sets, tmp_path)) == [0, 0]
    assert reports(tmp_path) == reports(report)
    written = {path.name.split(".")[-2] for path in (tmp_path / "values").iterdir() if path.stat().st_size}
    assert written == {"0", "1"}  # both have scored


def test_two_processes_end_together_at_an_unreadable_image(
    sets: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sets["s"], tmp_path / "s")
    (tmp_path / "s" / "00001" / "samples" / "0001.png").write_bytes(b"no image")
    assert in_two_processes(arguments(sets | {"s": tmp_path / "s"}, tmp_path / "out")) == [2, 2]
    assert capfd.readouterr().err.count("error: ") == 1


def test_an_interrupted_evaluation_resumes_to_the_same_report(
    sets: dict[str, Path], report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = scoring.Cache.append, list[int]()

    def stops(cache: Any, values: Any) -> None:
        append(cache, values)
        calls.append(len(values))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(scoring.Cache, "append", stops)
    assert evaluate.main(arguments(sets, tmp_path)) == 130
    file = next((tmp_path / "values").glob("tiny-reward-*"))
    with file.open("a") as stream:
        stream.write('["cut of')  # as an interruption in the middle of a line leaves it
    monkeypatch.setattr(scoring.Cache, "append", lambda *more: (calls.append(1), append(*more)))
    assert evaluate.main(arguments(sets, tmp_path)) == 0
    distinct = len({path.read_bytes() + bytes([n]) for folder in sets.values() for n in range(6)
                    for path in (folder / f"{n:05d}").glob("samples/*")})  # fmt: skip
    reward_batches = -(-distinct // 5)
    assert calls[:2] == [5, 5]
    assert len(calls) == 3 * reward_batches + diversity_batches(sets)
    assert reports(tmp_path) == reports(report)
    calls.clear()
    assert evaluate.main(arguments(sets, tmp_path)) == 0
    assert calls == []


def diversity_batches(sets: dict[str, Path]) -> int:
    groups = {(n, *(path.read_bytes() for path in sorted((folder / f"{n:05d}").glob("samples/*"))))
              for folder in sets.values() for n in range(6)}  # fmt: skip
    return -(-len(groups) // 2)  # two units of two images in a batch of five


def test_a_changed_image_and_a_changed_prompt_are_scored_again(
    sets: dict[str, Path], report: Path, tmp_path: Path
) -> None:
    shutil.copytree(report, tmp_path / "out")
    two = {name: Path(shutil.copytree(sets[name], tmp_path / name)) for name in ("base", "s")}
    draw(SCENES["a red circle and a blue square"], 0).save(two["s"] / "00000" / "samples" / "0000.png")
    for folder in two.values():
        (folder / "00005" / "metadata.jsonl").write_text('{"prompt": "a cat"}\n')
    assert evaluate.main(arguments(two, tmp_path / "out")) == 0
    before = {(r["method"], r["file"]): r[TINY] for r in rows(report / "images.csv")}
    after = {(r["method"], r["file"]): r[TINY] for r in rows(tmp_path / "out" / "images.csv")}
    changed = {key for key in after if abs(float(after[key]) - float(before[key])) > 1e-3}
    cats = {(name, f"00005/samples/{seed:04d}.png") for name in two for seed in range(SEEDS)}
    assert changed == {("s", "00000/samples/0000.png")} | cats


def test_the_report_says_what_scored_and_what_generated(report: Path) -> None:
    summary = json.loads((report / "report.json").read_text())
    assert summary["sets"]["s"]["generated by"] == "S (tiny_s.safetensors)"
    assert summary["sets"]["foreign"]["generated by"] == "foreign"
    assert summary["settings"]["dtype"] == "float32"
    assert set(summary["settings"]["scorers"]) == {TINY, VALIDATION, "correct", "diversity"}
    assert len({row["file"] for row in rows(report / "images.csv")}) == 12
    assert len(rows(report / "images.csv")) == 36
    assert len(rows(report / "prompts.csv")) == 18
