"""One prompt for each image: a text, its lines, or a list of texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError
from hyperalign.prompts import non_empty_lines, on_one_line, prompts_for, prompts_for_batches

OTHER_BREAKS = "\u2028\u2029\u0085\v\f\x1c\x1d\x1e\r"
"""What `str.splitlines` takes for the end of a line besides the line feed."""


@given(st.text(), st.integers(1, 5))
def test_a_text_is_one_prompt_by_default(text: str, count: int) -> None:
    assert prompts_for(text, count) == [text.strip()] * count


@pytest.mark.parametrize("between", ["\n", "\r\n", "\n\n", "\n \r\n"])
def test_lines_are_one_per_image_by_choice(between: str) -> None:
    text = f" a{between}b {between}"
    assert prompts_for(text, 2, "one per image") == ["a", "b"]
    assert prompts_for(" a ", 3, "one per image") == ["a"] * 3
    assert prompts_for("\n", 2, "one per image") == ["", ""]


@given(st.text(alphabet=OTHER_BREAKS + "ab", min_size=1))
def test_nothing_but_the_line_feed_separates_lines(text: str) -> None:
    assert non_empty_lines(f"a{text}b") == [f"a{text}b"]


def test_a_list_is_one_for_each_image_and_its_texts_keep_their_lines() -> None:
    assert prompts_for(["a\nb", "c"], 2, "one per image") == ["a\nb", "c"]
    assert prompts_for(["a\nb"], 2) == ["a\nb"] * 2
    assert prompts_for_batches(["a", "b"], [1, 2], "one prompt") == ["a", "b", "b"]
    assert prompts_for_batches(["a", "b", "c"], [1, 2], "one prompt") == ["a", "b", "c"]
    assert prompts_for_batches("a", [1, 2], "one prompt") == ["a"] * 3


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("a\nb", "Found 2 lines of prompts for 3 images"), (["a", "b"], "Found 2 prompts in a list for 3")],
)
def test_another_number_is_refused(prompt: str | list[str], said: str) -> None:
    with pytest.raises(HyperAlignError, match=f"{said}.* expected 1 for all of them, or 3"):
        prompts_for(prompt, 3, "one per image")


def test_a_table_shows_a_prompt_on_one_line() -> None:
    assert on_one_line(" a\n\n b\u2028c ") == "a b c"
