"""The audit finds the differences built into the images, with intervals, and resumes when interrupted."""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import stats

from hyperalign.cli import main as command
from hyperalign.cli.audit import measuring
from hyperalign.cli.audit.groups import expand, groups_of
from hyperalign.cli.audit.pixels import ALTERATIONS, properties
from hyperalign.cli.audit.statistics import (
    difference,
    largest_gap,
    mean,
    paired,
    rank_correlation,
)
from hyperalign.errors import HyperAlignError

TINY = "tiny reward"
numbers = st.lists(st.floats(-100, 100), min_size=4, max_size=30)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 circles and squares, red ones on grey and blue ones on white; labels.csv and prompts.csv beside."""
    folder, draw = tmp_path / "images", random.Random(0)
    folder.mkdir()
    labels, prompts = [("name", "colour", "note")], [("name", "prompt")]
    for index in range(24):
        colour, shape = ("red", "blue")[index % 2], ("circle", "square")[index // 2 % 2]
        image = Image.new("RGB", (64, 64), "grey" if colour == "red" else "white")
        x = draw.randint(4, 20)
        pen = ImageDraw.Draw(image)
        (pen.ellipse if shape == "circle" else pen.rectangle)((x, x, x + 30, x + 30), fill=colour)
        image.save(folder / f"{index}.png")
        labels.append((f"{index}.png", colour, ""))
        prompts.append((f"{index}.png", f"a {colour} {shape}"))
    for name, rows in (("labels", labels), ("prompts", prompts)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    return folder


def run(images: Path, *more: str) -> int:
    common = ["--reward", TINY, "--device", "cpu", "--out", str(images.parent / "audit")]
    return command.main(["audit", str(images), *common, *more])


def result(images: Path) -> dict[str, dict]:
    found = json.loads((images.parent / "audit" / "audit.json").read_text(encoding="utf-8"))
    return {finding["title"]: finding for finding in found["findings"]}


def test_one_prompt_over_groups_shows_which_group_scores_higher(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["--groups", f"{images.parent}/labels.csv"]
    assert run(images, "--template", "a {red|blue} circle", *labels, "--alter") == 0
    found = result(images)
    under_red = found["colour: images by group, all under “a red circle”"]
    assert under_red["gap"]["highest"] == "red"
    assert under_red["gap"]["difference"]["low"] > 0
    assert under_red["lines"]["red"]["count"] == 12
    assert found["colour: images by group, all under “a blue circle”"]["gap"]["highest"] == "blue"
    assert "note" not in str(found.keys())  # an empty column has no groups
    terms = found["the same images under “a {red|blue} circle”"]
    assert terms["lines"].keys() == {"a red circle", "a blue circle"}
    assert found["the same images, altered"]["lines"].keys() == ALTERATIONS.keys()
    said = capsys.readouterr().out
    assert "largest gap: red above blue" in said
    assert "A gap does not prove a bias" in said


def test_groups_come_from_words_in_the_images_own_prompts(images: Path) -> None:
    prompts = ["--prompts", f"{images.parent}/prompts.csv"]
    assert run(images, *prompts, "--groups", "shape=circle|square") == 0
    found = result(images)["shape: images by group, each under its own prompt"]
    assert {name: line["count"] for name, line in found["lines"].items()} == {"circle": 12, "square": 12}


def test_csv_html_and_json_have_the_same_estimates(images: Path) -> None:
    assert run(images, "--template", "a {red|blue} circle") == 0
    folder = images.parent / "audit"
    with (folder / "audit.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    page = (folder / "audit.html").read_text(encoding="utf-8")
    for finding in result(images).values():
        for name, line in finding["lines"].items():
            assert any(row["group"] == name and float(row["value"]) == line["value"] for row in rows)
            assert f"{line['value']:.4f}" in page
    assert "http" not in page.replace("http-equiv", "")
    assert {path.name for path in folder.iterdir()} == {
        "audit.html", "audit.json", "audit.csv", ".audit.log.jsonl",
    }  # fmt: skip


def test_names_of_groups_are_escaped_in_the_page(images: Path) -> None:
    with (images.parent / "labels.csv").open("w", newline="") as stream:
        rows = [(f"{i}.png", ("<script>alert(1)</script>", "b & c")[i % 2]) for i in range(24)]
        csv.writer(stream).writerows([("name", "<b>colour</b>"), *rows])
    assert run(images, "--template", "a {red|blue} circle", "--groups", f"{images.parent}/labels.csv") == 0
    page = (images.parent / "audit" / "audit.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "<b>" not in page


def test_an_interrupted_audit_resumes(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--template", "a {red|blue} circle", "--batch", "6"]
    assert run(images, *asked) == 0
    whole = (images.parent / "audit" / "audit.json").read_bytes()
    for path in (images.parent / "audit").iterdir():
        path.unlink()
    scored, measured = [], measuring._measure_batch

    def stops(*given, **named):
        if len(scored) == 2:
            raise KeyboardInterrupt
        return counted(*given, **named)

    def counted(*given, **named):
        scored.append(1)
        return measured(*given, **named)

    monkeypatch.setattr(measuring, "_measure_batch", stops)
    assert run(images, *asked) == 130
    assert "The same command resumes" in capsys.readouterr().err
    monkeypatch.setattr(measuring, "_measure_batch", counted)
    assert run(images, *asked) == 0
    assert len(scored) == 4
    assert (images.parent / "audit" / "audit.json").read_bytes() == whole


def test_damaged_images_are_skipped_and_named(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "broken.png").write_bytes(b"no image")
    assert run(images, "--template", "a {red|blue} circle") == 0
    assert "skipped broken.png: it cannot be decoded" in capsys.readouterr().err
    assert "1 images were skipped" in (images.parent / "audit" / "audit.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "There is no prompt to score the images under"),
        (["--template", "a heart"], "expected terms in braces"),
        (["--template", "a {red|blue circle"], "expected terms in braces"),
        (["--template", "a {red} circle"], "expected terms in braces"),
        (["--template", "a {zebra|red} heart"], "the word 'zebra'"),
        (["--template", "a {red|blue} heart", "--groups", "c=red|blue"], "searches the images' prompts"),
        (["--template", "a {red|blue} heart", "--groups", "gone.csv"], "there is no file gone.csv"),
        (["--template", "a {red|blue} heart", "--groups", "gone.txt"], "expected a .csv or .jsonl file"),
        (["--prompts", "PROMPTS", "--groups", "c=green|black"], "c has 0 groups among the images"),
        (["--template", "a {red|blue} heart", "--reward", TINY], "give each of them once"),
        (
            ["--template", "a {red|blue} heart", "--reward", "hpsv2.1", "--weights", "x"],
            "There is no HPS_v2.1",
        ),
    ],
)
def test_bad_inputs_are_refused_before_anything_is_scored(
    images: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert run(images, *(str(images.parent / "prompts.csv") if m == "PROMPTS" else m for m in more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert not (images.parent / "audit" / "audit.json").exists()


def test_templates_expand_to_all_combinations() -> None:
    assert expand("a {red|blue} {cat | dog}") == ["a red cat", "a red dog", "a blue cat", "a blue dog"]


def test_terms_are_whole_words_and_images_with_several_belong_to_no_group() -> None:
    prompts = {"a": "a woman", "b": "a Man", "c": "a man and a woman", "d": "a table"}
    assert groups_of("who=woman|man", prompts, list(prompts)) == {"who": {"a": "woman", "b": "man"}}


def test_groups_are_read_from_json_lines_with_backslashes_in_names(tmp_path: Path) -> None:
    rows = [
        {"file": "x\\a.png", "age": 30, "prompt": "p"},
        {"file": "./b.png", "age": 60},
        {"file": "c.png", "age": 9},
    ]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert groups_of(str(tmp_path / "g.jsonl"), {}, ["x/a.png", "b.png"]) == {
        "age": {"x/a.png": "30", "b.png": "60"}
    }
    with pytest.raises(HyperAlignError, match="line 1 has no name, only age"):
        (tmp_path / "g.jsonl").write_text('{"age": 3}')
        groups_of(str(tmp_path / "g.jsonl"), {}, ["b.png"])


@settings(deadline=None)
@given(numbers, numbers)
def test_intervals_are_those_of_scipys_tests(first: list[float], second: list[float]) -> None:
    """Student's, Welch's and, for Spearman's correlation, Fisher's interval, where these are defined."""
    first, second = ([round(value, 2) for value in values] for values in (first, second))
    if min(len(set(first)), len(set(second))) < 2:
        return
    student = stats.ttest_1samp(first, 0.0).confidence_interval(0.95)
    found = mean(first)
    assert (found.low, found.high) == pytest.approx(tuple(student), rel=1e-6, abs=1e-6)
    welch = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    found = difference(first, second)
    assert (found.low, found.high) == pytest.approx(tuple(welch), rel=1e-6, abs=1e-6)
    count = min(len(first), len(second))
    if min(len(set(first[:count])), len(set(second[:count]))) > 1:
        found = rank_correlation(first[:count], second[:count])
        rho = stats.spearmanr(first[:count], second[:count]).statistic
        assert found.value == pytest.approx(rho, abs=1e-9)
        center, half = math.atanh(max(-0.9999999, min(0.9999999, rho))), 1.959964 / math.sqrt(count - 3)
        assert (found.low, found.high) == pytest.approx(
            (math.tanh(center - half), math.tanh(center + half)), abs=1e-3
        )


def test_the_intervals_of_a_worked_example() -> None:
    """Student's t is 2.776445 for 4 degrees of freedom and 2.306004 for 8, as in the published tables."""
    found = mean([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.low, found.high) == pytest.approx((1.036757, 4.963243), abs=1e-6)
    found = difference([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 6.0])
    assert (found.low, found.high) == pytest.approx((-3.306004, 1.306004), abs=1e-6)


def test_intervals_contain_the_true_value_in_95_of_100_cases() -> None:
    draw = random.Random(1)
    hits = 0
    for _ in range(2000):
        found = difference([draw.gauss(1, 1) for _ in range(8)], [draw.gauss(0, 3) for _ in range(12)])
        hits += found.low is not None and found.high is not None and found.low <= 1 <= found.high
    assert 0.935 < hits / 2000 < 0.965


@given(numbers)
def test_an_interval_contains_its_mean(values: list[float]) -> None:
    found = mean(values)
    assert found.low is not None and found.high is not None
    assert found.low <= fmean(values) <= found.high


@given(numbers, st.floats(0.1, 5))
@example([0.0, 0.0, 0.0, 1.9e-157], 1.0)
def test_pairs_find_a_shift_that_groups_may_hide(values: list[float], shift: float) -> None:
    shifted = [value + shift for value in values]
    alone, together = difference(shifted, values), paired(shifted, values)
    assert together.value == pytest.approx(shift, abs=1e-6)
    assert together.is_significant
    assert alone.value == pytest.approx(shift, abs=1e-6)


@given(numbers)
def test_rank_correlation_with_any_increasing_function_is_1(values: list[float]) -> None:
    found = rank_correlation(values, [value**3 for value in values])
    distinct = len({value**3 for value in values}) == len(set(values)) > 1
    assert not distinct or found.value == pytest.approx(1.0)
    assert rank_correlation(values, [1.0] * len(values)).value == 0.0


def test_the_largest_gap_is_corrected_for_the_number_of_pairs() -> None:
    draw = random.Random(2)
    groups = {name: [draw.gauss(0, 1) for _ in range(10)] for name in "abcdef"}
    gap = largest_gap(groups)
    assert gap is not None and gap.difference.low is not None
    alone = difference(groups[gap.highest], groups[gap.lowest])
    assert alone.low is not None
    assert gap.difference.low < alone.low
    assert largest_gap({"a": [1.0], "b": []}) is None


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 100))
def test_alterations_stay_images(height: int, width: int, seed: int) -> None:
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    for alter in ALTERATIONS.values():
        altered = alter(image)
        assert altered.shape == image.shape
        assert 0.0 <= float(altered.min()) and float(altered.max()) <= 1.0
    assert all(value == value for value in properties(image).values())


def test_properties_follow_the_alteration_that_is_named_after_them() -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.1
    plain = properties(image)
    after: Callable[[str], dict[str, float]] = lambda name: properties(ALTERATIONS[name](image))  # noqa: E731
    assert after("darker by 20 %")["brightness"] == pytest.approx(0.8 * plain["brightness"], rel=1e-4)
    assert after("without colour")["saturation"] == pytest.approx(0.0, abs=1e-5)
    assert after("colours 40 % stronger")["saturation"] > plain["saturation"]
    assert after("blurred")["sharpness"] < plain["sharpness"]
    assert after("mirrored") == pytest.approx(plain, rel=0.1)


def test_it_runs_as_a_command(images: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hyperalign", "audit", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--template" in done.stdout
