"""Selection by score."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError
from hyperalign.selection import SelectionMode, select

SCORES = st.lists(st.floats(-10, 10), min_size=1, max_size=20)


@given(SCORES, st.sampled_from(["top-k", "threshold", "sort"]), st.integers(1, 25), st.floats(-10, 10))
def test_every_image_is_in_one_half_and_both_fall(
    scores: list[float], mode: SelectionMode, k: int, threshold: float
) -> None:
    chosen, rejected = select(scores, mode, k, threshold)
    assert sorted(chosen + rejected) == list(range(len(scores)))
    ordered = [scores[index] for index in chosen + rejected]
    assert ordered == sorted(scores, reverse=True)


@given(SCORES, st.integers(1, 25), st.floats(-10, 10))
def test_each_mode_keeps_what_it_says(scores: list[float], k: int, threshold: float) -> None:
    assert len(select(scores, "top-k", k)[0]) == min(k, len(scores))
    assert len(select(scores, "sort")[0]) == len(scores)
    chosen, rejected = select(scores, "threshold", threshold=threshold)
    assert all(scores[index] >= threshold for index in chosen)
    assert all(scores[index] < threshold for index in rejected)


def test_equals_keep_their_order() -> None:
    assert select([1.0, 2.0, 1.0, 2.0], "top-k", 2) == ([1, 3], [0, 2])


@pytest.mark.parametrize("scores", [[], [1.0, math.nan], [math.inf]])
def test_scores_that_are_none_are_refused(scores: list[float]) -> None:
    with pytest.raises(HyperAlignError, match="expected at least one, and numbers only"):
        select(scores, "sort")


def test_none_to_keep_is_refused() -> None:
    with pytest.raises(HyperAlignError, match="k is 0"):
        select([1.0], "top-k", 0)


def test_one_is_the_best_alone_and_the_threshold_itself_passes() -> None:
    scores = [0.5, -1.0, 0.0, 2.0]
    assert select(scores, "top-k") == ([3], [0, 2, 1])
    assert select(scores, "threshold") == ([3, 0, 2], [1])
    assert select(scores, "threshold", threshold=0.5) == ([3, 0], [2, 1])
    assert select(scores, "top-k", 1, threshold=9.0) == ([3], [0, 2, 1])
    assert select(scores, "sort", 1, 9.0) == ([3, 0, 2, 1], [])
    assert select([1.0], "top-k", 5) == ([0], [])
