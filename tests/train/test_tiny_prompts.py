"""Validation prompts are new, distinct and cover all families."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError
from hyperalign.tiny.prompts import FAMILIES, TEMPLATES, caption, content_of, sample_content
from train.tiny.dataset import training_prompts, validation_prompts


def test_validation_prompts_are_distinct_and_never_trained_on() -> None:
    prompts = validation_prompts(240, seed=2601)
    assert len({text for text, _ in prompts}) == 240
    assert not {text for text, _ in prompts} & set(training_prompts(2000, seed=0))
    assert set(Counter(content.family for _, content in prompts)) == set(FAMILIES)


def test_asking_for_more_prompts_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.tiny.dataset.MAX_TRIES", 2)
    with pytest.raises(HyperAlignError, match="Ask for fewer"):
        validation_prompts(100_000, seed=0)


@given(st.integers(0, 10_000), st.sampled_from(FAMILIES), st.sampled_from(TEMPLATES))
def test_a_prompt_says_what_it_asks_for(seed: int, family: str, template: str) -> None:
    content = sample_content(random.Random(seed), family)
    assert content_of(caption(content, template)) == content
    assert content_of(f"  {caption(content, template).upper()}. ") == content


@pytest.mark.parametrize(
    "prompt",
    ["", "dog", "a dog and", "a picture of", "two dogs and a cat", "a dog and a red heart", "a dog on a cat"],
)
def test_a_prompt_of_no_family_is_refused(prompt: str) -> None:
    with pytest.raises(HyperAlignError, match="six families"):
        content_of(prompt)
