"""GenEval's rules against labels made by hand, and against scenes whose content is known."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError
from hyperalign.geneval.prompts import COLORS, NAMES, Prompt, Requirement, parse_prompt, read_metadata
from hyperalign.geneval.rules import Box, Detection, Evaluation, evaluate, relations, select
from hyperalign.geneval.summary import summarise, table
from hyperalign.tiny.geneval import Detection as TinyDetection
from hyperalign.tiny.geneval import is_correct
from hyperalign.tiny.prompts import FAMILIES, MIRRORED, Content, near_miss, sample_content

GENEVAL = Path(__file__).resolve().parents[4] / "shared/data/geneval"
OFFICIAL = pytest.mark.skipif(not GENEVAL.exists(), reason="GenEval's data are not in ../shared/data")


def box(x: float, y: float, wide: float = 20, high: float = 20) -> Box:
    return (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)


def detected(
    name: str, x: float = 50, y: float = 50, *, color: str | None = None, score: float = 0.95
) -> Detection:
    return Detection(name, score, box(x, y), color)


def evaluated(metadata: dict[str, Any], *detections: Detection) -> Evaluation:
    prompt = parse_prompt({"prompt": "p", **metadata})
    return evaluate(prompt, select(detections, prompt.tag))


TWO_CLOCKS = {
    "tag": "counting",
    "include": [{"class": "clock", "count": 2}],
    "exclude": [{"class": "clock", "count": 3}],
}
BLUE_DOG = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "blue"}]}
DOG_RIGHT_OF_BEAR = {
    "tag": "position",
    "include": [
        {"class": "bear", "count": 1},
        {"class": "dog", "count": 1, "position": ["right of", 0]},
    ],
}


@pytest.mark.parametrize(
    ("clocks", "reasons"),
    [
        (1, ("expected clock>=2, found 1",)),
        (2, ()),
        (3, ("expected clock<3, found 3",)),
        (4, ("expected clock<3, found 4",)),
    ],
)
def test_counting_is_exact(clocks: int, reasons: tuple[str, ...]) -> None:
    found = [detected("clock", 30 * place) for place in range(clocks)]
    assert evaluated(TWO_CLOCKS, *found, detected("dog")).reasons == reasons


def test_counting_requires_higher_scores_than_the_others() -> None:
    unsure = [detected("clock", score=0.95), detected("clock", score=0.9), detected("clock", score=0.5)]
    assert evaluated(TWO_CLOCKS, *unsure).reasons == ("expected clock>=2, found 1",)
    assert evaluated({**TWO_CLOCKS, "tag": "single_object"}, *unsure).reasons == (
        "expected clock<3, found 3",
    )
    single = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    assert evaluated(single, detected("dog", score=0.31)).correct
    assert not evaluated(single, detected("dog", score=0.3)).correct


def test_no_more_than_sixteen_of_a_class_count() -> None:
    crowd = [detected("dog", place, score=0.5 + place / 100) for place in range(30)]
    found = select([*crowd, detected("cat")], "two_object")
    assert [one.score for one in found["dog"]] == [0.5 + place / 100 for place in range(29, 13, -1)]
    assert len(found["cat"]) == 1


def test_overlapping_detections_all_count() -> None:
    """The official script can suppress them, and does not."""
    assert evaluated(TWO_CLOCKS, detected("clock"), detected("clock")).correct


@pytest.mark.parametrize(
    ("found", "correct"),
    [
        ([detected("dog", color="blue")], True),
        ([detected("dog", color="red")], False),
        ([detected("dog", color="red", score=0.9), detected("dog", color="blue", score=0.8)], False),
        ([detected("dog", color="blue", score=0.9), detected("dog", color="red", score=0.8)], True),
        ([detected("cat", color="blue")], False),
    ],
)
def test_the_colour_is_that_of_the_most_certain_object(found: list[Detection], correct: bool) -> None:
    assert evaluated(BLUE_DOG, *found).correct is correct


def test_two_colours_may_not_be_swapped() -> None:
    metadata = {
        "tag": "color_attr",
        "include": [
            {"class": "wine glass", "count": 1, "color": "purple"},
            {"class": "apple", "count": 1, "color": "black"},
        ],
    }
    right = [detected("apple", color="black"), detected("wine glass", color="purple")]
    assert evaluated(metadata, *right).correct
    wrong = evaluated(metadata, detected("apple", color="purple"), detected("wine glass", color="black"))
    assert wrong.reasons[0] == "expected purple wine glass>=1, found 0 purple; and 1 black"
    assert len(wrong.reasons) == 2


@pytest.mark.parametrize(
    ("dog", "bear", "reasons"),
    [
        ((80, 50), (20, 50), ()),
        ((20, 50), (80, 50), ("expected dog right of target, found left of target",)),
        ((50, 20), (50, 80), ("expected dog right of target, found above target",)),
        ((50, 50), (50, 50), ("expected dog right of target, found  target",)),
        ((80, 80), (20, 20), ()),
        ((30, 90), (20, 20), ("expected dog right of target, found below target",)),
    ],
)
def test_a_position_is_that_of_the_centres(
    dog: tuple[float, float], bear: tuple[float, float], reasons: tuple[str, ...]
) -> None:
    assert evaluated(DOG_RIGHT_OF_BEAR, detected("dog", *dog), detected("bear", *bear)).reasons == reasons


def test_a_position_needs_its_target() -> None:
    assert evaluated(DOG_RIGHT_OF_BEAR, detected("dog")).reasons == (
        "expected bear>=1, found 0",
        "no target for dog to be right of",
    )


@pytest.mark.parametrize(
    ("first", "second", "sides"),
    [
        # 40 apart, less a tenth of 20 + 20: 36 / 40
        (box(10, 50), box(50, 50), ("left of",)),
        # 4 apart is just what the sizes eat up
        (box(46, 50), box(50, 50), ()),
        # diagonal: 36 / 56.6 on both axes
        (box(10, 10), box(50, 50), ("left of", "above")),
        # 50 degrees, large: (60 - 20) / 93.3 and (71.5 - 20) / 93.3, only the second above a half
        (box(160, 171.5, 100, 100), box(100, 100, 100, 100), ("below",)),
        # a high thin object: on y its height eats up all of 30
        (box(0, 80, 2, 300), box(40, 50, 2, 20), ("left of",)),
    ],
)
def test_relations_take_the_objects_sizes_into_account(
    first: Box, second: Box, sides: tuple[str, ...]
) -> None:
    assert relations(first, second) == sides


boxes = st.tuples(st.floats(0, 500), st.floats(0, 500), st.floats(1, 200), st.floats(1, 200)).map(
    lambda found: box(*found)
)


@given(boxes, boxes)
def test_relations_mirror_each_other(first: Box, second: Box) -> None:
    assert {MIRRORED[side] for side in relations(first, second)} == set(relations(second, first))
    assert len(set(relations(first, second)) & {"left of", "right of"}) <= 1
    assert len(set(relations(first, second)) & {"above", "below"}) <= 1


@given(boxes, boxes, st.floats(-100, 100), st.sampled_from([0.5, 2.0, 4.0]))
def test_relations_do_not_depend_on_place_or_scale(
    first: Box, second: Box, shift: float, scale: float
) -> None:
    rounded = [tuple(round(edge) for edge in one) for one in (first, second)]
    moved = [tuple((edge + round(shift)) * scale for edge in one) for one in rounded]
    assert relations(*moved) == relations(*rounded)  # type: ignore[arg-type]


detections = st.lists(
    st.builds(
        Detection,
        st.sampled_from(["dog", "bear", "clock"]),
        st.floats(0, 1),
        boxes,
        st.sampled_from(["blue", "red"]),
    ),
    max_size=20,
)


@given(detections, st.randoms())
def test_the_order_of_detections_does_not_matter(found: list[Detection], rng: random.Random) -> None:
    found = list({one.score: one for one in found}.values())
    shuffled = rng.sample(found, len(found))
    for metadata in (TWO_CLOCKS, BLUE_DOG, DOG_RIGHT_OF_BEAR):
        assert evaluated(metadata, *found) == evaluated(metadata, *shuffled)


@given(detections)
def test_what_a_prompt_does_not_name_never_matters(found: list[Detection]) -> None:
    for metadata, names in (
        (TWO_CLOCKS, {"clock"}),
        (BLUE_DOG, {"dog"}),
        (DOG_RIGHT_OF_BEAR, {"dog", "bear"}),
    ):
        assert evaluated(metadata, *found) == evaluated(metadata, *(d for d in found if d.name in names))


@given(detections, st.integers(1, 16))
def test_a_count_and_one_more_excluded_is_exactly_that_count(found: list[Detection], count: int) -> None:
    metadata = {
        "tag": "counting",
        "include": [{"class": "dog", "count": count}],
        "exclude": [{"class": "dog", "count": count + 1}],
    }
    dogs = min(16, sum(one.name == "dog" and one.score > 0.9 for one in found))
    assert evaluated(metadata, *found).correct is (dogs == count)


def scene(content: Content) -> list[Detection]:
    """Boxes of an EmojiScenes image that shows just this content, 64 pixels a side."""
    names = [(group.noun, group.color) for group in content.groups for _ in range(group.count)]
    spots = {
        None: [(16, 16), (48, 48), (48, 16), (16, 48)],
        "left of": [(14, 32), (50, 32)],
        "right of": [(50, 32), (14, 32)],
        "above": [(32, 14), (32, 50)],
        "below": [(32, 50), (32, 14)],
    }[content.relation]
    return [
        Detection(name, 0.95, box(x, y), color) for (name, color), (x, y) in zip(names, spots, strict=False)
    ]


def prompt_of(content: Content) -> Prompt:
    """A content of EmojiScenes as a GenEval prompt: the second object is positioned by the first."""
    groups, relation = content.groups, content.relation
    if relation is not None:
        groups = groups[::-1]
    include = [Requirement(group.noun, group.count, group.color) for group in groups]
    if relation is not None:
        include[1] = Requirement(groups[1].noun, 1, groups[1].color, relation, 0)
    exclude = [Requirement(group.noun, group.count + 1) for group in groups if content.family == "counting"]
    return Prompt("p", content.family, tuple(include), tuple(exclude))


@given(st.integers(0, 10**6), st.sampled_from(FAMILIES))
def test_scenes_are_right_for_their_content_and_wrong_for_a_near_miss(seed: int, family: Any) -> None:
    content = sample_content(random.Random(seed), family)
    missed = near_miss(content, random.Random(seed + 1))
    found = scene(content)
    tiny = [
        TinyDetection(d.name, d.color, (d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2, d.score)
        for d in found
    ]
    for wanted, right in ((content, True), (missed, False)):
        assert evaluate(prompt_of(wanted), select(found, family)).correct is right
        assert is_correct(wanted, tiny) is right, "the tiny model's own rules agree"


@OFFICIAL
def test_all_official_prompts_parse() -> None:
    rows = read_metadata(GENEVAL / "evaluation_metadata.jsonl")
    prompts = [parse_prompt(row) for row in rows]
    assert len(prompts) == 553
    assert Counter(prompt.tag for prompt in prompts) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    every = [one for prompt in prompts for one in prompt.include]
    assert {one.color for one in every} == {*COLORS, None}
    assert {one.relation for one in every} == {*MIRRORED, None}


@OFFICIAL
def test_an_ideal_image_of_each_official_prompt_is_right_and_an_empty_one_wrong() -> None:
    for row in read_metadata(GENEVAL / "evaluation_metadata.jsonl"):
        prompt = parse_prompt(row)
        side = next((one.relation for one in prompt.include if one.relation), None)
        second = {"left of": (20, 50), "right of": (80, 50), "above": (50, 20), "below": (50, 80)}.get(
            side or "", (80, 50)
        )
        ideal = [
            detected(one.name, *((50, 50) if place == 0 else second), color=one.color)
            for place, one in enumerate(prompt.include)
            for _ in range(one.count)
        ]
        assert evaluate(prompt, select(ideal, prompt.tag)) == Evaluation(True, ()), row
        assert not evaluate(prompt, {}).correct


@OFFICIAL
def test_the_classes_have_the_official_names_in_the_official_order() -> None:
    assert list(NAMES) == (GENEVAL / "object_names.txt").read_text().split("\n")[:80]


@pytest.mark.parametrize(
    "row",
    [
        {"tag": "counting", "prompt": "p"},
        {"tag": "t", "prompt": "p", "include": [{"class": "unicorn", "count": 1}]},
        {"tag": "t", "prompt": "p", "include": [{"class": "dog", "count": 0}]},
        {"tag": "t", "prompt": "p", "include": [{"class": "dog", "count": 1, "color": "mauve"}]},
        {"tag": "t", "prompt": "p", "include": [{"class": "dog", "count": 1, "position": ["near", 0]}]},
        {"tag": "t", "prompt": "p", "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]},
        ["no", "object"],
        None,
    ],
)
def test_other_metadata_are_refused(row: object, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(HyperAlignError, match="expected a line of GenEval's"):
        read_metadata(tmp_path / "m.jsonl")


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("{", "cannot be read")])
def test_a_damaged_file_of_metadata_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(HyperAlignError, match=message):
        read_metadata(tmp_path / "m.jsonl")


def test_both_definitions_of_overall() -> None:
    results = [
        ("counting", "a", True),
        ("counting", "a", False),
        ("counting", "b", False),
        ("colors", "c", True),
    ]
    summary = summarise(results)
    assert summary.task_mean == pytest.approx((1 / 3 + 1) / 2)
    assert summary.image_weighted == pytest.approx(2 / 4)
    assert summary.prompts == (2, 3)
    text = table(summary)
    assert "counting           33.33%  (1 of 3)" in text
    assert "mean of tasks   0.66667" in text
    assert "image-weighted  0.50000" in text
    with pytest.raises(HyperAlignError, match="nothing to summarise"):
        summarise([])


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6))
def test_the_two_definitions_agree_where_all_tasks_have_equally_many_images(
    tasks: list[list[bool]],
) -> None:
    summary = summarise((f"task {i}", f"{i}", right) for i, task in enumerate(tasks) for right in task)
    assert summary.task_mean == pytest.approx(summary.image_weighted)
    assert summary.prompts == (sum(map(any, tasks)), len(tasks))
