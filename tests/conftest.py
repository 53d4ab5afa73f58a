"""Puts the repository root at the END of sys.path: in front, its nodes/ would shadow ComfyUI's nodes.py."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])

if ROOT not in sys.path:
    sys.path.append(ROOT)
