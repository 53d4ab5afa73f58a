"""Fetches a reward's published files, when a person asks for it; nothing else in the pack downloads."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from ..errors import HyperAlignError
from ..files import check_writable, first_line
from .loading import recipe_of
from .weights import SUFFIX

HUB = "https://huggingface.co"
BLOCK = 1 << 20
TIMEOUT_SECONDS = 60
RANGE_PAST_THE_END = 416

Progress = Callable[[str, int, int], None]
"""Told a file's name, how many bytes are here, and how many it has: a block more while that is unknown."""


def download(name: str, folder: Path, progress: Progress | None = None) -> list[Path]:
    """Fetches what a reward still lacks into a folder, and returns where all of its files belong.

    An interrupted download goes on where it stopped, also in another process. Beside each file a `.json`
    keeps where it came from and its checksum. `HF_ENDPOINT` names a mirror of the hub, as for the hub's
    own client, whose present release cannot resume.

    Args:
        name: one of `loading.RECIPES`.
        folder: the rewards' folder.
        progress: told after every MiB; without it there is a bar in the terminal.

    Raises:
        HyperAlignError: another name, no network, or a folder that cannot be written to.
    """
    recipe = recipe_of(name)
    wanted = {folder / file.path: file.url for file in recipe.files}
    if (vocabulary := recipe.vocabulary) is not None:
        wanted |= {folder / "tokenizer" / file: f"{vocabulary.url}/{file}" for file in vocabulary.names}
    for path, url in wanted.items():
        download_file(url, path, progress)
    return list(wanted)


def download_file(url: str, path: Path, progress: Progress | None = None) -> None:
    """Fetches one published file, as `download` does, unless it or its converted form is there.

    What has arrived of it waits in a `.partial` file beside it. Raises HyperAlignError as `download`.
    """
    if path.is_file() or path.with_suffix(SUFFIX).is_file():
        return
    check_writable(path)
    mirrored, partial = _mirrored(url), path.with_name(f"{path.name}.partial")
    try:
        _continue(mirrored, partial, path.name, progress or _bar())
        _record(partial, path, url)
        partial.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise HyperAlignError(
            f"{path.name} could not be downloaded from {mirrored} ({first_line(error)}). Check the network "
            f"and try again: it goes on where it stopped. Or put the file into {path.parent} by hand."
        ) from error


def _continue(url: str, partial: Path, name: str, progress: Progress) -> None:
    here = partial.stat().st_size if partial.is_file() else 0
    try:
        response = _open(url, here)
    except HTTPError as error:
        if error.code != RANGE_PAST_THE_END:
            raise
        error.close()
        if error.headers["Content-Range"] == f"bytes */{here}":
            progress(name, here, here)
            return  # all of it is here: it was stopped before it got its name
        response = _open(url, 0)  # it is another file by now
    with response, partial.open("ab" if response.status == http.HTTPStatus.PARTIAL_CONTENT else "wb") as out:
        here = out.tell()
        length: str | None = response.headers["Content-Length"]
        total = None if length is None else here + int(length)
        while block := response.read(BLOCK):
            out.write(block)
            here += len(block)
            progress(name, here, here + BLOCK if total is None else total)
    if total is None:
        progress(name, here, here)
    elif here != total:
        raise OSError(f"the line broke after {here} of {total} bytes")


def _open(url: str, start: int) -> Any:
    """Returns a server's answer, from a byte on if the server can."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    return urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS)


def _mirrored(url: str) -> str:
    return url.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"), 1)


def _bar() -> Progress:
    """Returns a progress bar in the terminal for one file."""
    from tqdm import tqdm

    bar = tqdm(unit="B", unit_scale=True)

    def show(name: str, here: int, total: int) -> None:
        bar.desc, bar.total = f"{name}: ", total
        bar.update(here - bar.n)
        if here == total:
            bar.close()

    return show


def checksum(path: Path) -> str:
    """Returns a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _record(content: Path, path: Path, url: str) -> None:
    """Writes, beside the path where some content belongs, what it is."""
    record = {"file": path.name, "url": url, "bytes": content.stat().st_size, "sha256": checksum(content)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.json")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path.with_name(f"{path.name}.json"))
