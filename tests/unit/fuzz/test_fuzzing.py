"""What the fuzz tests would notice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fuzzing import MEMORY, Case, limited_memory

from hyperalign.errors import HyperAlignError


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such limit")
def test_memory_beyond_the_limit_is_refused_and_the_limit_ends() -> None:
    with limited_memory(), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(MEMORY + MEMORY // 4, dtype=torch.uint8)
    torch.empty(MEMORY + MEMORY // 4, dtype=torch.uint8)


def test_a_traceback_a_changed_file_and_half_a_sentence_are_noticed(case: Case) -> None:
    def no_error(_: Path) -> None:
        raise KeyError("x")

    def no_sentence(_: Path) -> None:
        raise HyperAlignError("It has three words")

    def refusing(_: Path) -> None:
        raise HyperAlignError("It has three words and a full stop.")

    with pytest.raises(KeyError):
        case.check("a.txt", b"a", no_error)
    for read in (lambda path: path.write_bytes(b"b"), lambda path: (path.parent / "b").touch(), no_sentence):
        with pytest.raises(AssertionError):
            case.check("a.txt", b"a", read)
    assert case.check("a.txt", b"a", refusing) == "It has three words and a full stop."
    assert case.check("a.txt", b"a", Path.read_bytes) is None
