"""Blind studies: the page reveals no method, the key does; votes are counted with intervals."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy import stats

from hyperalign.cli.main import main
from hyperalign.cli.study.images import methods_of
from hyperalign.cli.study.intervals import bootstrap, of_votes, wilson
from hyperalign.cli.study.results import rates
from hyperalign.cli.study.trials import QUESTIONS, Key, Trial, key_path, plan, read_key
from hyperalign.cli.study.votes import Vote, read_votes

NAMES = ("one", "three", "two", "four/five")
SECRET = "zebrafish"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Four images of three methods, whose metadata contain the methods."""
    made: list[Path] = []
    for number, method in enumerate((f"{SECRET}-base", f"{SECRET}-aligned", f"{SECRET}-other")):
        for index, name in enumerate(NAMES):
            path = tmp_path / method / f"{name}.{'jpg' if index == 2 and number == 1 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            said = PngInfo()
            said.add_text("method", method)
            more = {"comment": method.encode()} if path.suffix == ".jpg" else {"pnginfo": said}
            Image.new("RGB", (40, 20), (60 * index, 80 * number, 90)).save(path, **more)
        made.append(tmp_path / method)
    (tmp_path / "prompts.txt").write_text("\n".join(f'a "prompt" </script><b>{n}</b>' for n in range(4)))
    return made


def build(folders: list[Path], *more: str) -> int:
    prompts = ["--prompts", str(folders[0].parent / "prompts.txt")]
    out = ["--out", str(folders[0].parent / "study.html")]
    return main(["study", *map(str, folders), *prompts, *out, *more])


def page_of(folders: list[Path]) -> str:
    return (folders[0].parent / "study.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="study">(.*?)</script>', page, re.S)[1])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["study", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    return said


class Page(HTMLParser):
    """The addresses that a page loads, and the ids of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.labels: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.fetched += [value for key, value in attrs if key in ("src", "href", "action", "srcset")]
        self.ids += [found["id"]] if "id" in found else []
        self.labels |= {found["for"]: tag} if "for" in found else {}


def test_the_page_contains_no_method_and_loads_nothing(folders):
    assert build(folders) == 0
    page = page_of(folders)
    shown = re.sub(r"data:image/webp;base64,[\w+/=]+", "", page)
    assert SECRET not in page
    assert not any(name in shown for name in ("aligned", "base/", "four/five"))
    found = Page(page)
    assert found.fetched == []
    assert not re.search(r"https?:|//\w|@import|url\(", shown.replace("// ", ""))
    assert "default-src 'none'" in page
    assert len(found.ids) == len(set(found.ids))
    assert set(found.labels) <= set(found.ids)


def test_no_image_has_metadata_that_reveals_its_method(folders):
    assert build(folders, "--format", "jpeg") == 0
    for uri in data_of(page_of(folders))["images"]:
        content = base64.b64decode(uri.partition(",")[2])
        assert SECRET.encode() not in content
        assert "comment" not in Image.open(io.BytesIO(content)).info


def test_prompts_are_escaped_in_the_page(folders):
    build(folders)
    prompts = {trial["prompt"] for trial in data_of(page_of(folders))["trials"]}
    assert prompts == {f'a "prompt" </script><b>{n}</b>' for n in range(4)}


def test_the_page_has_every_pair_and_the_key_its_methods(folders):
    build(folders)
    key, data = read_key(key_path(folders[0].parent / "study.html")), data_of(page_of(folders))
    assert len(key.trials) == 4 * 3
    assert [trial.id for trial in key.trials] == [trial["id"] for trial in data["trials"]]
    assert len(data["images"]) == 4 * 3, "each image is there once"
    for trial, shown in zip(key.trials, data["trials"], strict=True):
        for method, index in zip((trial.first, trial.second), shown["images"], strict=True):
            content = base64.b64decode(data["images"][index].partition(",")[2])
            colour = Image.open(io.BytesIO(content)).convert("RGB").getpixel((5, 5))
            number = [f"{SECRET}-base", f"{SECRET}-aligned", f"{SECRET}-other"].index(method)
            assert abs(colour[0] - 60 * NAMES.index(trial.name)) < 12
            assert abs(colour[1] - 80 * number) < 12


def test_the_same_command_gives_the_same_study_and_another_seed_another(folders):
    build(folders)
    first = page_of(folders)
    build(folders)
    assert page_of(folders) == first
    build(folders, "--seed", "1")
    assert data_of(page_of(folders))["id"] != data_of(first)["id"]


def test_a_sample_and_pairs_with_the_first_only(folders):
    build(folders, "--sample", "3", "--against-first")
    trials = read_key(folders[0].parent / "study.html").trials
    assert len(trials) == 3 * 2
    assert all(f"{SECRET}-base" in (trial.first, trial.second) for trial in trials)


@given(st.integers(1, 40), st.integers(2, 4), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_each_method_is_first_in_half_of_its_trials(names: int, methods: int, seed: int):
    trials = plan({f"n{i}": "p" for i in range(names)}, [f"m{i}" for i in range(methods)], seed)
    assert len({trial.id for trial in trials}) == len(trials) == names * methods * (methods - 1) // 2
    for one in range(methods):
        for other in range(one):
            sides = Counter(t.first for t in trials if {t.first, t.second} == {f"m{one}", f"m{other}"})
            assert abs(sides[f"m{one}"] - sides[f"m{other}"]) <= 1


def test_images_are_made_smaller_and_a_large_page_is_refused(folders, capsys):
    Image.effect_noise((900, 600), 90).convert("RGB").save(folders[0] / "one.png")
    build(folders, "--side", "300", "--quality", "50")
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size
        for uri in data_of(page_of(folders))["images"]
    ]
    assert sorted(set(sizes)) == [(40, 20), (300, 200)]
    assert build(folders, "--max-mb", "0.01") == 2
    assert "more than --max-mb 0.01" in capsys.readouterr().err


def test_bad_folders_and_prompts_are_refused_before_a_page_is_made(folders, tmp_path, capsys):
    one, two = map(str, folders[:2])
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "bad.html")]
    assert "Found one folder" in refused(capsys, one, *prompts)
    assert "given twice" in refused(capsys, one, one, *prompts)
    title = ["--title", f"{SECRET}-base or not"]
    assert f"contains the method '{SECRET}-base'" in refused(capsys, one, two, *title, *prompts)
    assert "There is no folder" in refused(capsys, one, str(tmp_path / "missing"), *prompts)
    (tmp_path / "strange").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "strange" / "x.png")
    said = refused(capsys, one, str(tmp_path / "strange"), *prompts)
    assert "no name in common (found four/five, x)" in said
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    assert "has 2 prompts for 4 names" in refused(capsys, one, two, *prompts)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    (folders[0] / "one.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    said = refused(capsys, one, two, *prompts)
    assert "one.png cannot be decoded" in said
    Image.new("RGB", (8, 8)).save(folders[0] / "two.jpg")
    assert "keep one of them" in refused(capsys, one, two, *prompts)
    assert not (tmp_path / "bad.html").exists()


def test_without_prompts_the_page_asks_the_questions_without_one(folders, capsys):
    assert main(["study", *map(str, folders), "--out", str(folders[0].parent / "study.html")]) == 0
    questions = [question["key"] for question in data_of(page_of(folders))["questions"]]
    assert questions == ["preference", "appeal"]
    assert "found no prompts" in capsys.readouterr().err
    (folders[0] / "one.txt").write_text("a prompt")
    assert "Found prompts for 1 of 4" in refused(capsys, *map(str, folders))


def test_folders_of_one_name_are_distinguished(tmp_path):
    for name in ("a/out", "b/out"):
        (tmp_path / name).mkdir(parents=True)
    assert list(methods_of([tmp_path / "a/out", tmp_path / "b/out"])) == ["a/out", "b/out"]


# --- votes


@pytest.fixture
def study(folders) -> Path:
    """The page of two methods, with its key beside it."""
    build(folders[:2])
    return folders[0].parent / "study.html"


def vote_file(page: Path, name: str, rater: str = "r1", favour: str | None = None, **other) -> str:
    """Writes a rater's votes: for one method, or for ties; returns the path."""
    key = read_key(page)
    answers = {
        trial.id: dict.fromkeys(
            key.questions, "tie" if favour is None else "first" if favour in trial.first else "second"
        )
        for trial in key.trials
    }
    content = {"format": "hyperalign-votes", "version": 1, "study": key.study, "rater": rater, "name": ""}
    (page.parent / name).write_text(json.dumps(content | {"votes": answers} | other))
    return str(page.parent / name)


def test_results_are_win_rates_with_intervals(study, capsys):
    votes = vote_file(study, "votes.json", favour="aligned")
    out = str(study.parent / "results.json")
    assert main(["study", "results", votes, "--key", str(study), "--out", out]) == 0
    said = capsys.readouterr().out
    assert f"preference  {SECRET}-base  {SECRET}-aligned  0.0%" in said
    found = json.loads(Path(out).read_text())
    assert [rate["question"] for rate in found["rates"]] == list(QUESTIONS)
    rate = found["rates"][0]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["rate"]) == (0, 0, 4, 0.0)
    assert rate["interval"] == [0.0, pytest.approx(0.4899, abs=1e-4)]  # Wilson's for 0 of 4
    assert (found["votes"], found["of"], found["raters"]) == (12, 12, 1)


def test_two_raters_are_bootstrapped_over_prompts(study):
    key = read_key(study)
    votes = read_votes(
        [
            Path(vote_file(study, "a.json", "r1", "aligned")),
            Path(vote_file(study, "b.json", "r2", None)),
        ],
        key,
    )
    rate = rates(votes, key)[0]
    assert (rate.rate, rate.wins, rate.ties, rate.losses, rate.prompts) == (0.25, 0, 4, 4, 4)
    assert rate.interval == wilson(1.0, 4), "all prompts have one mean, so that the bootstrap has no spread"


def test_a_rater_who_saved_twice_counts_once(study):
    key = read_key(study)
    paths = [Path(vote_file(study, name, "r1", "base")) for name in ("early.json", "late.json")]
    early = json.loads(paths[0].read_text())
    early["votes"] = dict(list(early["votes"].items())[:2])
    paths[0].write_text(json.dumps(early))
    assert len(read_votes(paths, key)) == 12


def test_bad_votes_are_refused(study, capsys):
    key = ["--key", str(study)]
    good = vote_file(study, "good.json", "r1", "base")
    other = vote_file(study, "other.json", study="0123")
    assert "votes of the study 0123, but the key is of" in refused(capsys, "results", other, *key)
    foreign = vote_file(study, "foreign.json", format="photo")
    assert "is no file of votes" in refused(capsys, "results", foreign, *key)
    torn = study.parent / "torn.json"
    torn.write_text(Path(good).read_text()[:40])
    assert "is not JSON" in refused(capsys, "results", str(torn), *key)
    strange = vote_file(study, "strange.json", votes={"ffffffff": {"preference": "first"}})
    assert "is no answer of this study" in refused(capsys, "results", strange, *key)
    contrary = vote_file(study, "contrary.json", "r1", "aligned")
    assert "of one rater (r1) and differ" in refused(capsys, "results", good, contrary, *key)
    empty = vote_file(study, "empty.json", votes={})
    assert "There is no vote in" in refused(capsys, "results", empty, *key)
    assert "There is no file of votes" in refused(capsys, "results", "nowhere.json", *key)
    assert "is no key of a study" in refused(capsys, "results", good, "--key", good)
    key_path(study).unlink()
    assert "make the study again with the same folders" in refused(capsys, "results", good, *key)


# --- statistics


@given(st.integers(1, 300), st.data())
def test_wilson_contains_the_share_and_narrows_with_more_votes(count: int, data: st.DataObject):
    points = data.draw(st.integers(0, 2 * count)) / 2
    low, high = wilson(points, count)
    assert 0.0 <= low <= points / count <= high <= 1.0
    more = wilson(4 * points, 4 * count)
    assert more.high - more.low < high - low
    mirrored = wilson(count - points, count)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low))


@given(st.integers(1, 300), st.data())
@settings(deadline=None)
def test_wilson_is_scipys_for_whole_wins(count: int, data: st.DataObject):
    wins = data.draw(st.integers(0, count))
    found = stats.binomtest(wins, count).proportion_ci(0.95, method="wilson")
    assert wilson(wins, count) == pytest.approx((found.low, found.high), abs=1e-9)


def test_the_bootstrap_is_that_of_a_plain_loop():
    """Percentiles over resampled prompts with the standard library; equal but for the resampling noise."""
    draw = random.Random(5)
    points = {str(n): [draw.choice((0.0, 0.5, 1.0)) for _ in range(1 + n % 3)] for n in range(40)}
    prompts = list(points.values())
    means: list[float] = []
    for _ in range(4000):
        votes = [won for prompt in draw.choices(prompts, k=len(prompts)) for won in prompt]
        means.append(sum(votes) / len(votes))
    means.sort()
    assert bootstrap(points) == pytest.approx((means[100], means[-101]), abs=0.012)


def test_wilson_is_the_published_interval():
    # Brown, Cai and DasGupta's formula solved for 8 of 10 by hand: centre 0.71675, half-width 0.22659.
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_the_bootstrap_is_within_0_and_1_and_repeatable(votes: list[list[float]]):
    points = {str(index): found for index, found in enumerate(votes)}
    low, high = bootstrap(points, resamples=200)
    flat = [won for found in votes for won in found]
    assert 0.0 <= low <= high <= 1.0
    assert low <= sum(flat) / len(flat) + 1e-9 or len(votes) < 4
    assert bootstrap(points, resamples=200) == (low, high)


def test_raters_who_repeat_each_other_do_not_narrow_the_interval():
    prompts = {str(index): [float(index % 2)] for index in range(20)}
    alone = bootstrap(prompts)
    repeated = bootstrap({prompt: votes * 10 for prompt, votes in prompts.items()})
    assert repeated == alone
    naive = wilson(100, 200)
    assert repeated.high - repeated.low > 2 * (naive.high - naive.low)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4), min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_an_interval_is_never_narrower_than_that_of_independent_votes(votes: list[list[float]]):
    points = {str(index): found for index, found in enumerate(votes)}
    flat = [won for found in votes for won in found]
    low, high = of_votes(points)
    alone = wilson(sum(flat), len(flat))
    assert low <= alone.low <= alone.high <= high
    assert (low, high) == alone or len(flat) > len(votes)


def test_of_three_methods_each_is_also_compared_with_all_others():
    trials = tuple(
        Trial(f"{n}{pair[0]}{pair[1]}", f"n{n}", f"p{n}", *pair)
        for n in range(2)
        for pair in (("a", "b"), ("c", "a"), ("b", "c"))
    )
    key = Key("s", "t", 0, ("a", "b", "c"), ("preference",), trials)
    votes = [Vote("r", t, "preference", "first" if t.first == "a" else "second") for t in trials]
    found = {(rate.method, rate.against): rate.rate for rate in rates(votes, key)}
    assert found["a", "all others"] == 1.0
    assert found["a", "b"] == found["a", "c"] == 1.0
    assert found["c", "all others"] == 0.5
