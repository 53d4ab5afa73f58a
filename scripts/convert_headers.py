"""Brings the words in the headers of committed weights up to date: `python scripts/convert_headers.py`.

Tensors keep their bytes; only the JSON metadata of each file changes. A second run changes nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end: see "nodes" in CONTRIBUTING.md

from hyperalign.files import write_bytes
from scripts.common import ROOT, say

TERMS = {
    "heldout": "validation",
    "held-out": "validation",
    "a picture": "an image",
    "picture": "image",
    '"figures"': '"metrics"',
    '"preference data"': '"preference dataset"',
    '"draws emoji only"': '"generates emoji only"',
    '"drawn by rule: ': '"rendered by rule: ',
}
"""Old word and new word, in the order in which they are replaced."""
LENGTH_BYTES = 8


def converted(content: bytes) -> bytes:
    """Returns a safetensors file with new words in its metadata; the tensors keep their bytes."""
    end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    header = json.loads(content[LENGTH_BYTES:end])
    metadata = header.get("__metadata__", {})
    for old, new in TERMS.items():
        metadata = {key: value.replace(old, new) for key, value in metadata.items()}
    header["__metadata__"] = metadata
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # the format aligns tensors to 8 bytes
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + content[end:]


def main() -> int:
    """Converts every committed file; returns the exit status."""
    for path in sorted((ROOT / "hyperalign" / "tiny").glob("*/*.safetensors")):
        content = path.read_bytes()
        if (new := converted(content)) != content:
            write_bytes(path, new)
            say(f"converted {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
