"""What a file says of its conditioning, in words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.conditioning import percent, sentences, share_sentence, warning

SHARES = {"same": 0.94, "prompt": 0.0204, "time": 0.03, "interaction": 0.0096}
GAIN = {
    "averaged": {
        "geneval": {"gain": 0.05, "low": 0.01, "high": 0.09},
        "validation_reward": {"gain": 0.7, "low": 0.5, "high": 0.9},
    },
    "of another prompt": {"geneval": {"gain": -0.01, "low": -0.03, "high": 0.0}},
}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def test_shares_and_losses_are_sentences() -> None:
    assert sentences({"conditioning": {"shares": SHARES, "gain": GAIN}}) == [
        "2 % of these weights depend on the prompt, 3 % on time, 1.0 % on both together; 94 % are the same "
        "for all.",
        "With its weights averaged into one LoRA for all prompts and times: GenEval -0.05 [-0.09, -0.01], "
        "validation reward -0.7 [-0.9, -0.5].",
        "With its weights exchanged for those of another prompt: GenEval +0.01 [+0, +0.03].",
    ]
    assert sentences({}) == []


def test_a_gain_without_an_interval_says_so() -> None:
    stated = {"conditioning": {"gain": {"averaged": {"geneval": {"gain": 0.25}}}}}
    assert sentences(stated)[0].endswith("GenEval -0.25 [too few prompts for an interval].")


@given(value=anything, shares=anything, gain=anything)
def test_whatever_a_file_states_is_read_without_a_traceback(value: Any, shares: Any, gain: Any) -> None:
    for stated in (value, {"shares": shares, "gain": gain}, {"gain": {"averaged": gain}}):
        assert all(isinstance(line, str) for line in sentences({"conditioning": stated}))


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.5, "50 %"), (0.0204, "2 %"), (0.0096, "1.0 %"), (0.0004, "0.04 %"), (0.994, "99.4 %"),
     (0.99951, "99.95 %"), (0.00002, "0.00 %"), (0.0, "0 %"), (1.0, "100 %")],
)  # fmt: skip
def test_a_share_has_the_digits_that_tell_it_from_nothing_and_all(share: float, text: str) -> None:
    assert percent(share) == text


def test_weights_that_hardly_depend_on_the_prompt_are_warned_of() -> None:
    assert "Only 0.5 %" in warning(SHARES | {"prompt": 0.005})
    assert "--network.conditioning none" in warning(SHARES | {"prompt": 0.0})
    assert warning(SHARES) == warning(SHARES | {"prompt": 0.01}) == warning({}) == ""


def test_the_sentence_of_shares_is_that_of_the_card() -> None:
    assert share_sentence(SHARES) == sentences({"conditioning": {"shares": SHARES}})[0]
