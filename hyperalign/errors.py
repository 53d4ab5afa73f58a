"""The exception of the library for wrong input."""


class HyperAlignError(ValueError):
    """Wrong input. The message states what was found, what was expected and how to fix it."""
