"""Prints the model card of a hypernetwork, or writes it to a file.

python -m hyperalign card mine.safetensors                   prints it
python -m hyperalign card mine.safetensors --out README.md   writes it, as the Hugging Face hub wants it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..card import card, write
from ..checkpoint import read_header
from ..errors import HyperAlignError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m hyperalign card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", type=Path, help="a hypernetwork (.safetensors)")
    add("--out", type=Path, metavar="CARD", help="where to write the card instead of printing it")
    options = parser.parse_args(arguments)
    try:
        text = card(read_header(options.file), options.file.stem)
        if options.out is not None:
            write(options.out, text)
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text if options.out is None else f"Wrote {options.out}")
    return 0
