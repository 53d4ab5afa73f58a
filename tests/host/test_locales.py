"""The node texts in four languages, compared key by key with the live schemas."""

from __future__ import annotations

import re

import pytest

from scripts.locales import ENGLISH, FILES, TRANSLATED, english, flat, read

# vue-i18n reads these as syntax: {name}, @:link, one | many.
SYNTAX = re.compile(r"[{}@|]")
NATIVE = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7af]"}
PLACE = re.compile(r"[a-z_]+/[a-z_]+(?:\.[a-z]+)?")


@pytest.fixture(scope="module")
def texts(server):
    return english(server.client.object_info())


@pytest.mark.parametrize("file", FILES)
def test_english_matches_the_schemas(texts, file):
    assert read(ENGLISH, file) == texts[file], "run `python3 scripts/locales.py`"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("language", TRANSLATED)
def test_a_translation_has_every_text_and_no_other(texts, language, file):
    there, expected = flat(read(language, file)), flat(texts[file])
    assert there.keys() - expected.keys() == set()
    assert expected.keys() - there.keys() == set()
    assert [key for key, text in there.items() if not text.strip()] == []


@pytest.mark.parametrize("language", TRANSLATED)
def test_sentences_are_in_the_language_and_keep_the_names_of_files(texts, language):
    there, expected = flat(read(language, "nodeDefs.json")), flat(texts["nodeDefs.json"])
    sentences = {key: there[key] for key in expected if key.endswith((".tooltip", ".description"))}
    assert [key for key, text in sentences.items() if not re.search(NATIVE[language], text)] == []
    for key, text in sentences.items():
        assert set(PLACE.findall(expected[key])) <= set(PLACE.findall(text)), key


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("language", [ENGLISH, *TRANSLATED])
def test_no_text_is_read_as_syntax_by_the_page(language, file):
    assert {key: text for key, text in flat(read(language, file)).items() if SYNTAX.search(text)} == {}


@pytest.mark.parametrize("language", [ENGLISH, *TRANSLATED])
def test_the_host_serves_the_texts(server, language):
    served = server.client.get("/i18n")[language]
    assert served["nodeDefs"] == read(language, "nodeDefs.json")
    assert served["dataTypes"] == read(language, "main.json")["dataTypes"]
