"""Prints the model card of a hypernetwork, or writes it to a file.

python -m hyperalign card mine.safetensors                   prints it
python -m hyperalign card mine.safetensors --out README.md   writes it, as the Hugging Face hub expects it
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..card import card, write
from ..checkpoint import read_header
from .common.arguments import command_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status. Raises HyperAlignError."""
    parser = command_parser("card", __doc__)
    add = parser.add_argument
    add("file", type=Path, help="a hypernetwork (.safetensors)")
    add("--out", type=Path, metavar="CARD", help="file to write instead of printing the card")
    options = parser.parse_args(arguments)
    text = card(read_header(options.file), options.file.stem)
    if options.out is not None:
        write(options.out, text)
    print(text if options.out is None else f"Wrote {options.out}")
    return 0
