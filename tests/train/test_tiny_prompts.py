"""Validation prompts are new, distinct and cover all families."""

from __future__ import annotations

from collections import Counter

import pytest

from hyperalign.errors import HyperAlignError
from hyperalign.tiny.prompts import FAMILIES
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
