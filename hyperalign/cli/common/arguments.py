"""Parsers of command lines."""

from __future__ import annotations

import argparse

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def command_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Returns the parser of a command; the description keeps its lines."""
    return argparse.ArgumentParser(
        prog=f"python -m hyperalign {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive(text: str) -> int:
    """Returns a whole number of 1 or more. Raises ArgumentTypeError and ValueError."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected 1 or more")
    return number
