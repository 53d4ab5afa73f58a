"""The one exception type a user of the library has to know."""


class HyperAlignError(ValueError):
    """Wrong input. The message says what was found, what was expected and how to fix it."""
