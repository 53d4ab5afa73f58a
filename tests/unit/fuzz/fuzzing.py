"""Damaged files of all kinds, and what must hold when they are read.

Every test here reads a hundred files or more. With `--hypothesis-profile=fuzz` (tests/conftest.py) they are
5,000, and 10,000 hypernetworks.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError

LONGEST_MESSAGE = 4000
MEMORY = 2 << 30
"""What reading one small file may allocate at most, in bytes."""

HUGE = (2**31, 2**63, 10**9, 10**12, 10**400, -1, -(2**63), 0)
NUMBERS = st.sampled_from([*HUGE, 0.5, 1e308, float("nan"), float("inf"), -float("inf")])
WORDS = st.sampled_from(["", " ", "\0", "\ud800", "..", "/", "0", "-10", "S", "nan", "é🦊", "*", "a" * 2000])
SCALARS = st.none() | st.booleans() | st.integers() | NUMBERS | st.floats() | st.text(max_size=6) | WORDS
ODD = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | WORDS, inner, max_size=3)
    ),
    max_leaves=6,
)


def fuzzed(times: int = 1) -> Callable[[Any], Any]:
    """Returns a test's settings: `times` as many examples as other tests, none of which takes long."""
    return settings(
        max_examples=times * settings.default.max_examples,
        deadline=10_000,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """Returns a copy of a JSON value with one to three changes at random places."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        value = _changed_once(draw, value)
    return value


def _changed_once(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(ODD)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(list(keys)))
    match draw(st.sampled_from(["inside"] * 5 + ["remove", "repeat", "swap"])):
        case "remove":
            del value[key]
        case "repeat" if isinstance(value, list):
            value.extend([value[key]] * draw(st.sampled_from([1, 2, 200])))
        case "repeat":
            value[draw(WORDS)] = value[key]
        case "swap":
            other = draw(st.sampled_from(list(keys)))
            value[key], value[other] = value[other], value[key]
        case _:
            value[key] = _changed_once(draw, value[key])
    return value


@st.composite
def json_texts(draw: st.DrawFn, valid: Any) -> str:
    """Returns JSON of a changed value, now and then with changes that no value has."""
    text = json.dumps(draw(changed(valid)))
    at = draw(st.integers(0, len(text)))
    match draw(st.sampled_from(["as it is"] * 6 + ["cut", "deep", "digits", "twice", "sign"])):
        case "cut":
            return text[:at]
        case "deep":
            return "[" * 100_000 + text
        case "digits":
            return text.replace("1", "1" * 5000, 1)
        case "twice":  # the same keys once more
            return text[:-1] + ", " + text[1:] if text.startswith("{") and len(text) > 2 else text * 2
        case "sign":
            return text[:at] + draw(st.characters()) + text[at:]
        case _:
            return text


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Returns bytes that were cut, overwritten, repeated or replaced."""
    at = draw(st.integers(0, len(data)))
    match draw(st.sampled_from(["cut", "overwrite", "insert", "append", "random"])):
        case "cut":
            return data[:at]
        case "overwrite":
            piece = draw(st.binary(min_size=1, max_size=8))
            return data[:at] + piece + data[at + len(piece) :]
        case "insert":
            return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
        case "append":
            return data + draw(st.binary(min_size=1) | st.just(data))
        case _:
            return draw(st.binary(max_size=200))


@dataclass(frozen=True, repr=False)
class Case:
    """A folder for one file at a time."""

    folder: Path

    def check(self, name: str, content: bytes, read: Callable[[Path], object]) -> str | None:
        """Returns the sentence with which a file is refused, None if it is read.

        Any other exception comes through; the file is then still there. Asserts that nothing in its folder
        is changed.
        """
        path = self.folder / name
        path.write_bytes(content)
        before = self._state()
        said = None
        try:
            with limited_memory():
                read(path)
        except HyperAlignError as error:
            said = str(error)
            assert 20 <= len(said) <= LONGEST_MESSAGE, f"{len(said)} letters: {said[:400]}"
            assert said.rstrip().endswith((".", ")")), said[-200:]
        assert self._state() == before
        return said

    def _state(self) -> dict[str, tuple[bytes, int]]:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@contextmanager
def limited_memory() -> Iterator[None]:
    """Makes allocations fail beyond MEMORY; where the system knows no such limit, does nothing."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
