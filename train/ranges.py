"""Checks of a recipe's values."""

from __future__ import annotations

from hyperalign.errors import HyperAlignError, shortened


def require(holds: bool, name: str, found: object, expected: str) -> None:
    """Raises HyperAlignError with a setting's name, its value and what was expected, unless `holds`."""
    if not holds:
        raise HyperAlignError(
            f"{name} is {shortened(str(found))}; expected {expected}. Change it in the recipe or on the "
            "command line."
        )
