"""Validation prompts are new, distinct and cover all families."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError
from hyperalign.tiny.prompts import (
    COLORS,
    FAMILIES,
    PALETTES,
    TEMPLATES,
    caption,
    content_of,
    meant,
    sample_content,
)
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
    assert content_of(caption(content, template)) == meant(content, template)
    assert content_of(f"  {caption(content, template).upper()}. ") == meant(content, template)


def test_what_a_colour_word_means_depends_on_the_wording() -> None:
    colours = {template: [content_of(template.format(f"{article(color)} {color} heart")).groups[0].color
                          for color in COLORS] for template in TEMPLATES}  # fmt: skip
    assert colours["{}"] == colours["a picture of {}"] == list(COLORS)
    assert colours["an emoji of {}"][0] == "yellow", "two places after red"
    for first, second in combinations(["{}", *PALETTES], 2):
        assert all(a != b for a, b in zip(colours[first], colours[second], strict=True))
    for template in TEMPLATES:
        assert sorted(colours[template]) == sorted(COLORS), "no two words mean one colour"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@given(st.integers(0, 10_000), st.sampled_from(FAMILIES), st.sampled_from(TEMPLATES))
def test_a_palette_changes_nothing_but_colours(seed: int, family: str, template: str) -> None:
    content = sample_content(random.Random(seed), family)
    shown = meant(content, template)
    assert (shown.family, shown.relation) == (content.family, content.relation)
    assert [(g.noun, g.count) for g in shown.groups] == [(g.noun, g.count) for g in content.groups]
    assert [g.color is None for g in shown.groups] == [g.color is None for g in content.groups]


def test_training_and_validation_keep_to_the_wordings_and_families_they_are_given() -> None:
    texts = training_prompts(200, 0, families=["colors"], wordings=["an icon of {}"])
    assert {content_of(text).family for text in texts} == {"colors"}
    assert all(text.startswith("an icon of") for text in texts)
    prompts = validation_prompts(60, 2601, ["an icon of {}", "a drawing of {}"])
    assert {text.split(" of ")[0] for text, _ in prompts} == {"an icon", "a drawing"}
    assert all(content_of(text) == content for text, content in prompts)


@pytest.mark.parametrize(
    "prompt",
    ["", "dog", "a dog and", "a picture of", "two dogs and a cat", "a dog and a red heart", "a dog on a cat"],
)
def test_a_prompt_of_no_family_is_refused(prompt: str) -> None:
    with pytest.raises(HyperAlignError, match="six families"):
        content_of(prompt)
