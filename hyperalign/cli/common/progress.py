"""The progress bar of the commands."""

from __future__ import annotations

from typing import NoReturn

from tqdm import tqdm


def progress_bar(total: int, description: str, done: int = 0) -> tqdm[NoReturn]:
    """Returns a bar on standard error that counts images and starts at `done`."""
    return tqdm(total=total, initial=done, desc=description, unit="image", smoothing=0.05)
