"""What every reader promises of any file: a value or one sentence, in bounded memory, and nothing written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # fuzzing.py

from fuzzing import Case


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)
