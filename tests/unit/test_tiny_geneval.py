"""The rules of the six families of the tiny GenEval, its summary and diversity."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError
from hyperalign.tiny.geneval import Detection, diversity, is_correct, summarise
from hyperalign.tiny.prompts import FAMILIES, MIRRORED, Content, Family, Group, near_miss, sample_content


def found(noun: str, x: float = 32, y: float = 32, color: str | None = None, score: float = 0.9) -> Detection:
    return Detection(noun, color, x, y, score)


def test_single_object_needs_the_noun_and_forgives_extras() -> None:
    content = Content("single_object", (Group("dog"),))
    assert is_correct(content, [found("dog"), found("cat")])
    assert is_correct(content, [found("dog"), found("dog", 10, 10)])
    assert not is_correct(content, [found("cat")])
    assert not is_correct(content, [])


def test_two_object_needs_both() -> None:
    content = Content("two_object", (Group("dog"), Group("cat")))
    assert is_correct(content, [found("cat"), found("dog"), found("key")])
    assert not is_correct(content, [found("dog"), found("dog", 10, 10)])


@pytest.mark.parametrize(
    ("dogs", "others", "right"), [(3, 0, True), (2, 0, False), (4, 0, False), (3, 1, False)]
)
def test_counting_is_exact_and_punishes_extras(dogs: int, others: int, right: bool) -> None:
    content = Content("counting", (Group("dog", count=3),))
    detections = [found("dog", 10.0 * i) for i in range(dogs)] + [found("cat") for _ in range(others)]
    assert is_correct(content, detections) is right


def test_counting_of_shapes_needs_the_colour() -> None:
    content = Content("counting", (Group("heart", "red", 2),))
    assert is_correct(content, [found("heart", 10, color="red"), found("heart", 40, color="red")])
    assert not is_correct(content, [found("heart", 10, color="red"), found("heart", 40, color="blue")])


def test_colors_needs_the_shape_in_its_colour() -> None:
    content = Content("colors", (Group("circle", "green"),))
    assert is_correct(content, [found("circle", color="green")])
    assert not is_correct(content, [found("circle", color="blue"), found("square", color="green")])


def test_color_attribution_refuses_swapped_colours() -> None:
    content = Content("color_attribution", (Group("heart", "red"), Group("square", "blue")))
    assert is_correct(content, [found("square", color="blue"), found("heart", color="red")])
    assert not is_correct(content, [found("square", color="red"), found("heart", color="blue")])


def test_position_needs_distance_along_its_axis() -> None:
    content = Content("position", (Group("dog"), Group("cat")), "left of")
    assert is_correct(content, [found("dog", 10), found("cat", 50)])
    assert not is_correct(content, [found("dog", 50), found("cat", 10)])
    assert not is_correct(content, [found("dog", 30), found("cat", 33)]), "within the margin"
    assert not is_correct(content, [found("dog", 20, 5), found("cat", 30, 60)]), "far more above than left"
    assert not is_correct(content, [found("dog", 10)])


@given(*[st.floats(0, 64) for _ in range(4)])
def test_a_relation_and_its_mirror_agree(x0: float, y0: float, x1: float, y1: float) -> None:
    dog, cat = found("dog", x0, y0), found("cat", x1, y1)
    for relation, mirrored in MIRRORED.items():
        there = Content("position", (Group("dog"), Group("cat")), relation)
        back = Content("position", (Group("cat"), Group("dog")), mirrored)
        assert is_correct(there, [dog, cat]) == is_correct(back, [dog, cat])


def laid_out(content: Content) -> list[Detection]:
    """What a perfect detector finds in an image of the content, its first object on the named side."""
    sides = {
        "left of": (8, 32, 56, 32),
        "right of": (56, 32, 8, 32),
        "above": (32, 8, 32, 56),
        "below": (32, 56, 32, 8),
    }
    if content.relation is not None:
        x0, y0, x1, y1 = sides[content.relation]
        return [found(content.groups[0].noun, x0, y0), found(content.groups[1].noun, x1, y1)]
    return [found(group.noun, 16 * i, 8, group.color) for group in content.groups for i in range(group.count)]


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_a_near_miss_is_never_right(seed: int) -> None:
    rng = random.Random(seed)
    content = sample_content(rng)
    missed = near_miss(content, rng)
    shown = laid_out(missed)
    assert is_correct(missed, shown)
    assert not is_correct(content, shown)


def test_summary_is_the_mean_over_families() -> None:
    results: list[tuple[Family, bool]] = [
        ("single_object", True),
        ("single_object", True),
        ("counting", False),
    ]
    assert summarise(results) == {"overall": 0.5, "single_object": 1.0, "counting": 0.0}
    full = summarise((family, True) for family in FAMILIES)
    assert full == {"overall": 1.0, **dict.fromkeys(FAMILIES, 1.0)}


def test_an_empty_summary_is_refused() -> None:
    with pytest.raises(HyperAlignError, match="no image was scored"):
        summarise([])


def test_diversity_of_equal_orthogonal_and_opposite_images() -> None:
    same = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    orthogonal = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    values = diversity(torch.stack([same, orthogonal, opposite])).tolist()
    assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(values, [0.0, 1.0, 2.0], strict=True))


@pytest.mark.parametrize("shape", [(4, 8), (4, 1, 8)])
def test_diversity_needs_two_seeds(shape: tuple[int, ...]) -> None:
    with pytest.raises(HyperAlignError, match="two seeds"):
        diversity(torch.zeros(shape))
