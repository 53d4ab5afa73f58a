"""Tokens of odd texts, against the tokenizers that each reward's own authors use."""

from __future__ import annotations

import json
import logging
import sys
import unicodedata
from pathlib import Path
from typing import Any

import ftfy
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperalign.rewards import cleaning, loading, text
from hyperalign.rewards.cleaning import open_clip_text
from hyperalign.rewards.text import Tokenizer

ODD_TEXTS = json.loads((Path(__file__).parent / "odd_texts.json").read_text(encoding="utf-8"))
TEXTS: list[str] = [
    *(odd for texts in ODD_TEXTS.values() for odd in texts),
    *(f"a red{chr(code)}cat {chr(code)}" for code in [*range(0x20), *range(0x7F, 0xA1)]),
    *(f"of{chr(code)}ce" for code in range(0xFB00, 0xFB07)),
    "x" * 400,
    "\u00e9" * 400,
    "Ab1!" * 100,
    "a cat, " * 100,
]
OPEN_CLIP = ("hpsv2", "hpsv2.1")
TRANSFORMERS_CLIP = ("pickscore", "clip")


def ids(name: str, folder: Path, prompts: list[str]) -> Tensor:
    vocabulary = loading.PUBLISHED[name].vocabulary
    assert vocabulary is not None
    return vocabulary.load(folder)(prompts)


def up_to_end(tokens_BL: Tensor, end: int) -> list[list[int]]:
    """Rows without their padding, which the networks ignore and each tokenizer writes in its own way."""
    return [row[: len(row) - row[::-1].index(end)] for row in tokens_BL.tolist()]


def differences(found: list[list[int]], expected: list[list[int]], prompts: list[str]) -> dict[str, Any]:
    assert len(found) == len(expected) == len(prompts)
    rows = zip(prompts, found, expected, strict=True)
    return {prompt: (ours, theirs) for prompt, ours, theirs in rows if ours != theirs}


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary in BERT's format with every letter of the texts, so that nothing is hidden in [UNK]."""
    folder = tmp_path_factory.mktemp("bert")
    letters = {letter for odd in TEXTS for letter in unicodedata.normalize("NFKD", (odd + odd.lower()))}
    letters |= {letter for odd in TEXTS for letter in odd + odd.lower()}
    letters = sorted(letter for letter in letters if letter.isprintable() and not letter.isspace())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "red", *letters]
    words += [f"##{letter}" for letter in letters]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


def without_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    cleaning._report_missing_ftfy.cache_clear()


def test_the_texts_are_many_and_distinct() -> None:
    assert len(set(TEXTS)) == len(TEXTS) >= 200
    assert "" in TEXTS


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_hps_s_tokens_are_open_clip_s(name: str, vocabularies: Path) -> None:
    expected = open_clip.get_tokenizer("ViT-H-14")(TEXTS)
    end = int(expected.max())
    found = ids(name, vocabularies, TEXTS)
    assert differences(up_to_end(found, end), up_to_end(expected, end), TEXTS) == {}


@pytest.mark.parametrize("name", TRANSFORMERS_CLIP)
def test_pickscore_s_and_clip_score_s_tokens_are_transformers(name: str, vocabularies: Path) -> None:
    from transformers import CLIPTokenizer

    official: Any = CLIPTokenizer.from_pretrained(str(vocabularies))
    expected = official(TEXTS, truncation=True, max_length=77).input_ids
    found = up_to_end(ids(name, vocabularies, TEXTS), official.eos_token_id)
    assert differences(found, expected, TEXTS) == {}


def test_imagereward_s_tokens_are_those_of_blip_s_bert(bert_folder: Path) -> None:
    from transformers import BertTokenizer

    official: Any = BertTokenizer.from_pretrained(str(bert_folder))
    official.add_special_tokens({"bos_token": "[DEC]"})
    official.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    expected = official(TEXTS, padding="max_length", truncation=True, max_length=35)
    found = ids("imagereward", bert_folder, TEXTS)
    assert differences(found.tolist(), expected.input_ids, TEXTS) == {}
    masks = text.bert_attention_mask(found)
    assert differences(masks.tolist(), expected.attention_mask, TEXTS) == {}


FRAGMENTS = st.sampled_from(
    ["&amp;", "&#8217;", "&lt", "<b>", "\u00c3\u00a9", "\u2019s", "\ufb01", "\uff21", "'S", "\u0130",
     "\u017f", "\u03a3", "e\u0301", "\x1b[31m", "\u200d", "\U0001f469\u200d\U0001f680", "\u2028", "\x85",
     "1\u00bd", "\u3000",
     "\u732b", "\ud55c", "\u05d0", "\u0644\u0627", "\u0e44\u0e17\u0e22", "\U0001f431", "\ufeff"]
)  # fmt: skip
OLD_LETTERS = st.text(st.characters(max_codepoint=0x52F), max_size=4)
"""Of blocks that have long been full: which new letters a tokenizer knows depends on its release."""
ANY_TEXT = st.lists(st.one_of(FRAGMENTS, OLD_LETTERS), max_size=8).map("".join)


@pytest.fixture(scope="module")
def both_open_clip(vocabularies: Path) -> tuple[Tokenizer, Tokenizer]:
    return text.OPEN_CLIP.load(vocabularies), open_clip.get_tokenizer("ViT-H-14")


@given(prompt=ANY_TEXT)
def test_any_text_has_open_clip_s_tokens(both_open_clip: tuple[Tokenizer, Tokenizer], prompt: str) -> None:
    ours, theirs = both_open_clip
    assert torch.equal(ours([prompt]), theirs([prompt]))


def test_without_ftfy_texts_that_need_no_repair_have_the_same_tokens(
    vocabularies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchanged = [odd for odd in TEXTS if ftfy.fix_text(odd) == odd]
    assert len(unchanged) > 50
    expected = ids("hpsv2.1", vocabularies, unchanged)
    without_ftfy(monkeypatch)
    assert torch.equal(ids("hpsv2.1", vocabularies, unchanged), expected)


def test_without_ftfy_the_first_text_that_needs_it_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_ftfy(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert open_clip_text(" A cat\r\n& a <b>dog</b>, &amp;lt;tag> ") == "a cat & a <b>dog</b>, <tag>"
        assert caplog.text == ""
        assert open_clip_text("it\u2019s") == open_clip_text("it&rsquo;s") == "it\u2019s"
    assert len(caplog.records) == 1
    assert "pip install ftfy" in caplog.text


def test_with_ftfy_nothing_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert open_clip_text("it\u2019s") == "it's"
    assert caplog.text == ""


@given(prompt=st.text(st.characters(max_codepoint=0x7F)) | ANY_TEXT)
def test_every_text_that_ftfy_changes_is_one_that_may_need_it(prompt: str) -> None:
    """But for ends of lines, which are blanks to both."""
    if not cleaning.MAY_NEED_REPAIR.search(prompt):
        assert ftfy.fix_text(prompt).split() == prompt.split()
