"""Downloads the published files of a reward on request; nothing else in the pack downloads.

Own client, because huggingface_hub 2.4 deletes an interrupted download, and two files are on GitHub only.
"""

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
from ..files import check_writable, first_line, write_text
from .loading import check_files, published_reward
from .weights import SUFFIX

HUB = "https://huggingface.co"
BLOCK = 1 << 20
TIMEOUT_SECONDS = 60
RANGE_PAST_THE_END = 416

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes received, and its size: one block more while that is unknown."""


def download(name: str, folder: Path, progress: Progress | None = None) -> list[Path]:
    """Downloads the missing files of a reward into a folder, and returns the paths of all its files.

    An interrupted download resumes where it stopped, also in another process. Beside each file a `.json`
    states its address and checksum. `HF_ENDPOINT` names a mirror of the hub, as for the hub's own client.

    Args:
        name: one of `loading.PUBLISHED`.
        folder: the rewards' folder.
        progress: called after every MiB; by default a bar in the terminal.

    Raises:
        HyperAlignError: another name, no network, or a folder that cannot be written to.
    """
    published = published_reward(name)
    files = {folder / file.path: file.url for file in published.files}
    if (vocabulary := published.vocabulary) is not None:
        files |= {folder / "tokenizer" / file: f"{vocabulary.url}/{file}" for file in vocabulary.file_names}
    for path, url in files.items():
        download_file(url, path, progress)
    return list(files)


def provide(name: str, folder: Path, tokenizer_folder: Path | None, download_missing: bool) -> list[Path]:
    """Downloads a reward's missing files if asked to; returns its weight files and reads none of them.

    Raises HyperAlignError unless all files are present then.
    """
    if download_missing:
        download(name, folder)
    return check_files(name, folder, tokenizer_folder)


def download_file(url: str, path: Path, progress: Progress | None = None) -> None:
    """Downloads one file as `download` does, unless it or its converted form exists.

    The bytes received so far are kept in a `.partial` file beside it. Raises HyperAlignError as `download`.
    """
    if path.is_file() or path.with_suffix(SUFFIX).is_file():
        return
    check_writable(path)
    mirrored, partial = _mirrored(url), path.with_name(f"{path.name}.partial")
    try:
        _resume(mirrored, partial, path.name, progress or _bar())
        _write_record(partial, path, url)
        partial.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise HyperAlignError(
            f"{path.name} could not be downloaded from {mirrored} ({first_line(error)}). Check the network "
            f"and try again: it resumes where it stopped. Or put the file into {path.parent} by hand."
        ) from error


def _resume(url: str, partial: Path, name: str, progress: Progress) -> None:
    received = partial.stat().st_size if partial.is_file() else 0
    try:
        response = _open(url, received)
    except HTTPError as error:
        if error.code != RANGE_PAST_THE_END:
            raise
        error.close()
        if error.headers["Content-Range"] == f"bytes */{received}":
            progress(name, received, received)
            return  # the file is complete: it was interrupted before it was renamed
        response = _open(url, 0)  # the published file has changed
    with response, partial.open("ab" if response.status == http.HTTPStatus.PARTIAL_CONTENT else "wb") as out:
        received = out.tell()
        length: str | None = response.headers["Content-Length"]
        total = None if length is None else received + int(length)
        while block := response.read(BLOCK):
            out.write(block)
            received += len(block)
            progress(name, received, received + BLOCK if total is None else total)
    if total is None:
        progress(name, received, received)
    elif received != total:
        raise OSError(f"the connection was lost after {received} of {total} bytes")


def _open(url: str, start: int) -> Any:
    """Returns a server's response, from the byte `start` on if the server supports it."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    return urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS)


def _mirrored(url: str) -> str:
    return url.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"), 1)


def _bar() -> Progress:
    """Returns a progress bar in the terminal for one file."""
    from tqdm import tqdm

    bar = tqdm(unit="B", unit_scale=True)

    def show(name: str, received: int, total: int) -> None:
        bar.desc, bar.total = f"{name}: ", total
        bar.update(received - bar.n)
        if received == total:
            bar.close()

    return show


def checksum(path: Path) -> str:
    """Returns a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write_record(content: Path, path: Path, url: str) -> None:
    """Writes origin and checksum of a downloaded file beside its final path."""
    record = {"file": path.name, "url": url, "bytes": content.stat().st_size, "sha256": checksum(content)}
    write_text(path.with_name(f"{path.name}.json"), json.dumps(record, indent=1) + "\n")
