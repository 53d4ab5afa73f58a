"""Hypernetwork files with any header, any tensors and any damage."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import Case, changed, damaged, fuzzed, json_texts
from hypothesis import given
from hypothesis import strategies as st

from hyperalign import checkpoint
from hyperalign.card import card
from hyperalign.checkpoint import HEADER_KEY, Header
from hyperalign.families.unet import TINY
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.provenance import sources
from hyperalign.schedule import Schedule

TRAINING = {
    "steps": 3,
    "recipe": {"objective": {"rewards": {"tiny reward": 1.0}}},
    "metrics": {"tiny reward": 0.5, "note": "late"},
    "conditioning": {"prompt": 0.2, "time": 0.1},
}


@dataclass(frozen=True, repr=False)
class Valid:
    """A small file with all that a header can hold."""

    content: bytes
    table: dict[str, Any]
    """The JSON at its start."""
    body: bytes
    header: dict[str, Any]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Valid:
    torch.manual_seed(0)
    targets = TINY.targets("prefix")[:2]
    config = HyperNetworkConfig(rank=1, a=2, b=2, width=8, layers=1, heads=2)
    network = HyperNetwork(config, targets, TINY.feature_channels, TINY.text_channels)
    header = Header(
        TINY.fingerprint(), "prefix", TINY.feature_channels, TINY.text_channels, targets, config,
        Schedule("P", (0.8, 0.5)), TRAINING, sources=sources("tiny", {"tiny reward": 1.0}, "EmojiScenes"),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("valid") / "valid.safetensors"
    checkpoint.save(path, network, header)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    header = json.loads(table["__metadata__"][HEADER_KEY])
    return Valid(content, table, content[8 + length :], header)


def joined(table: Any, body: bytes, length: int | None = None) -> bytes:
    """Returns a safetensors file of its JSON, or of a text, whose length it may misstate."""
    text = (table if isinstance(table, str) else json.dumps(table)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def with_header(valid: Valid, text: str) -> bytes:
    return joined(valid.table | {"__metadata__": {HEADER_KEY: text}}, valid.body)


def use(path: Path) -> None:
    """Does with a file what hosts and commands do before they sample."""
    made = checkpoint.load(path)
    card(made.header, path.stem)
    checkpoint.check_base(made.header, TINY)


@fuzzed(times=2)
@given(data=st.data())
def test_any_hypernetwork_file_is_read_or_refused(valid: Valid, case: Case, data: st.DataObject) -> None:
    table, body = valid.table, valid.body
    match data.draw(st.sampled_from(["header"] * 5 + ["tensors", "length", "bytes", "metadata"])):
        case "header":
            content = with_header(valid, data.draw(json_texts(valid.header)))
        case "tensors":
            content = joined(data.draw(changed(table)), data.draw(st.just(body) | damaged(body)))
        case "length":
            content = joined(
                table, body, data.draw(st.integers(0, 2**64 - 1) | st.integers(0, len(valid.content)))
            )
        case "metadata":
            content = joined(data.draw(json_texts(table)), body)
        case _:
            content = data.draw(damaged(valid.content))
    case.check("case.safetensors", content, use)
