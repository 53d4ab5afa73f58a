"""The loader's text says what shaped a hypernetwork, with licences and known biases."""

from __future__ import annotations

import dataclasses

import pytest

from hyperalign.checkpoint import Header, read_header
from hyperalign.conditioning import sentences
from hyperalign.provenance import sources
from hyperalign.tiny.weights import HYPERNETWORKS


@pytest.fixture
def header(comfy) -> Header:
    return read_header(HYPERNETWORKS / "tiny_p.safetensors")


def described(header: Header) -> list[str]:
    from hyperalign.hosts.comfy.files import describe

    return describe(header).splitlines()


def test_a_committed_file_names_reward_data_licences_and_biases(header):
    lines = described(header)
    assert lines[0].startswith("base: tiny (")
    assert any(
        line.startswith("reward: tiny preference reward (licence: Apache-2.0; known") for line in lines
    )
    assert any(line.startswith("preference dataset: EmojiScenes (licence: ") for line in lines)
    measured = sentences(header.training)
    assert len(measured) == 3
    assert set(measured) < set(lines)
    assert len(lines) - len(measured) < 10


def test_a_file_made_with_hpsv2_names_its_audits(header):
    made = dataclasses.replace(
        header,
        sources=sources("flux", {"hpsv2.1": 1.0, "clip": 0.5}, "Pick-a-Pic v2, preference images"),
        training={"steps": 300, "unsafe": "7 of 10 images left out as unsafe (nsfw > 0.5)"},
    )
    text = "\n".join(described(made))
    for said in ("reward: HPSv2.1", "0.5 x CLIP score", "2604.13305", "Non-Commercial", "7 of 10 images"):
        assert said in text


def test_missing_sources_are_reported(header):
    unsourced = dataclasses.replace(header, training={}, sources=())
    assert "reward and preference dataset: not recorded; ask the author of the file" in described(unsourced)
