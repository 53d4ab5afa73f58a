"""The evaluation's numbers: means over strata, intervals that are known exactly, the best of a column."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperalign.geneval.summary import summarise
from train.evaluation.report import Grid
from train.evaluation.table import IMAGE_WEIGHTED, TASK_MEAN, Metric, columns, metrics

NUMBERS = st.floats(-5, 5, allow_subnormal=False)


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def test_of_three_prompts_the_interval_is_the_least_and_the_greatest_difference() -> None:
    """27 resamples are equally likely; all three are the least one in 3.7 % of them, more than 2.5 %."""
    base, other = array(1.0, 5.0, 9.0), array(1.5, 5.1, 9.3)
    found = Metric("reward", {"base": base, "s": other}).difference("s", "base")
    assert found.value == pytest.approx(0.3)
    assert found.interval == pytest.approx((0.1, 0.5))
    assert found.is_significant


def test_an_interval_with_zero_in_it_is_not_significant_and_one_prompt_has_none() -> None:
    metric = Metric("reward", {"base": array(0.0, 0.0, 0.0), "s": array(-0.1, 0.2, 0.3)})
    assert not metric.difference("s", "base").is_significant
    single = Metric("reward", {"base": array(1.0), "s": array(2.0)}).difference("s", "base")
    assert (single.value, single.interval, single.is_significant) == (1.0, None, False)


def test_equal_sets_differ_by_nothing() -> None:
    metric = Metric("reward", {"base": array(1.0, 2.0, 4.0), "s": array(1.0, 2.0, 4.0)})
    found = metric.difference("s", "base")
    assert (found.value, found.interval) == (0.0, (0.0, 0.0))
    assert not found.is_significant


def test_the_official_overall_resamples_each_task_on_its_own() -> None:
    """Two tasks of two prompts: each has its least mean in a quarter of the resamples, both in 1/16."""
    shares = {"base": array(0.0, 0.0, 0.0, 0.0), "s": array(0.0, 1.0, 0.0, 0.5)}
    found = Metric("overall", shares, [[0, 1], [2, 3]]).difference("s", "base")
    assert found.value == pytest.approx(0.375)
    assert found.interval == pytest.approx((0.0, 0.75))


@given(st.lists(st.tuples(st.sampled_from(["colors", "counting", "position"]), st.lists(st.booleans(),
       min_size=2, max_size=2)), min_size=1, max_size=12))  # fmt: skip
def test_the_means_are_those_of_genevals_own_summary(marks: list[tuple[str, list[bool]]]) -> None:
    tags = [tag for tag, _ in marks]
    correct = np.array([row for _, row in marks], dtype=np.float64)
    found = {metric.name: metric.value("base") for metric in metrics({}, {"base": correct}, tags, {})}
    summary = summarise((tag, str(n), mark) for n, (tag, row) in enumerate(marks) for mark in row)
    assert found.pop(TASK_MEAN) == pytest.approx(summary.task_mean)
    assert found.pop(IMAGE_WEIGHTED) == pytest.approx(summary.image_weighted)
    shares = {tag: right / count for tag, (right, count) in summary.tasks.items()}
    assert found == pytest.approx(shares)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=8))
def test_an_interval_contains_the_difference_and_turns_with_its_sign(
    pairs: list[tuple[float, float]],
) -> None:
    one, other = (array(*values) for values in zip(*pairs, strict=True))
    metric = Metric("reward", {"a": one, "b": other})
    found, opposite = metric.difference("b", "a"), metric.difference("a", "b")
    assert found.interval is not None and opposite.interval is not None
    assert min(other - one) - 1e-9 <= found.interval.low <= found.interval.high <= max(other - one) + 1e-9
    assert found.value == pytest.approx(-opposite.value)
    assert found.interval == pytest.approx((-opposite.interval.high, -opposite.interval.low), abs=1e-9)


def test_the_best_is_the_greatest_but_for_seconds_and_ties_share_it() -> None:
    scores = {"base": array(1.0, 2.0), "p": array(2.0, 2.0), "s": array(2.0, 2.0)}
    table = {c.name: c.cells for c in columns([Metric("reward", scores)], {"base": 3.0, "p": None, "s": 3.5})}
    assert [cell is not None and cell.is_best for cell in table["reward"].values()] == [False, True, True]
    assert [cell is not None and cell.is_best for cell in table["s/image"].values()] == [True, False, False]
    assert table["s/image"]["p"] is None
    assert [name for name, cell in table["reward"].items() if cell and cell.difference] == ["p", "s"]


def test_without_a_record_of_time_there_is_no_column_for_it() -> None:
    metric = Metric("reward", {"base": array(1.0, 2.0)})
    assert [column.name for column in columns([metric], {"base": None})] == ["reward"]


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_page_shows_prompts_from_the_whole_list(shown: int, count: int) -> None:
    rows = Grid(shown, 1, 64).rows(count)
    assert len(set(rows)) == len(rows) == min(shown, count)
    assert rows[0] == 0 and rows[-1] < count
    assert max(np.diff([*rows, count])) <= -(-count // len(rows))
