"""Images of several methods: matched by name, and made small enough for one page."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from ...errors import HyperAlignError
from ...image_files import DECODING_ERRORS, data_uri, open_rgb
from ...prompts import non_empty_lines
from ...threads import Threads
from ..common.image_prompt import embedded_prompt
from ..common.images import list_images
from ..common.prompts import abridged, find_prompts, prompt_beside
from ..common.tables import read_text

Format = Literal["webp", "jpeg"]
MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Encoding:
    """The encoding of the page's images, equal for all of them so that it does not reveal the method."""

    format: Format = "webp"
    quality: int = 90
    side: int = 1024
    """Maximal length of the longer side in pixels."""


def methods_of(folders: Sequence[Path]) -> dict[str, Path]:
    """Returns the folders by method: their names, or more of their paths where names repeat.

    Raises HyperAlignError unless there are two different folders or more.
    """
    if len(folders) < 2:
        raise HyperAlignError("Found one folder of images; a study compares two or more.")
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        twice = next(folder for folder in folders if resolved.count(folder.resolve()) > 1)
        raise HyperAlignError(f"{twice} is given twice; give each folder once.")
    length = 1
    while len({path.parts[-length:] for path in resolved}) < len(resolved):
        length += 1
    return {"/".join(path.parts[-length:]): path for path in resolved}


def match(methods: Mapping[str, Path]) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Returns the images that all folders have, by name and method, and the names that some lack.

    A name is the path below the folder without its ending, so that `1.png` matches `1.jpg`.

    Raises HyperAlignError on a missing folder, no common name, or one name with two endings in a folder.
    """
    by_name: dict[str, dict[str, Path]] = defaultdict(dict)
    for method, folder in methods.items():
        for path in list_images(folder):
            name = str(PurePosixPath(path).with_suffix(""))
            if method in by_name[name]:
                raise HyperAlignError(
                    f"{folder} has {path} and {by_name[name][method].name}; keep one of them."
                )
            by_name[name][method] = folder / path
    common = {name: paths for name, paths in sorted(by_name.items()) if len(paths) == len(methods)}
    if not common:
        examples = (next(n for n, paths in by_name.items() if method in paths) for method in methods)
        raise HyperAlignError(
            f"The folders have no name in common (found {', '.join(examples)}); images of one prompt and "
            "seed must have the same name in every folder."
        )
    return common, sorted(set(by_name) - set(common))


def prompts_of(
    images: Mapping[str, Mapping[str, Path]], folder: Path, source: Path | None
) -> tuple[dict[str, str], str]:
    """Returns the prompts by the images' names; without any, all are empty, and the second text says why.

    Args:
        images: paths by name and method.
        folder: of the first method; the names of a table are relative to it.
        source: a .csv or .jsonl of names and prompts, a .txt with a line for each name in sorted order, or
            None for the text file beside an image or the metadata in it.

    Raises:
        HyperAlignError: a source that cannot be read, or prompts for only some of the images.
    """
    firsts = {name: next(iter(paths.values())) for name, paths in images.items()}
    if source is None:
        return _own_prompts(firsts)
    if source.suffix.lower() != ".txt":
        names = [path.relative_to(folder).as_posix() for path in firsts.values()]
        return dict(zip(firsts, find_prompts(folder, names, str(source)), strict=True)), ""
    lines = non_empty_lines(read_text(source))
    if len(lines) != len(firsts):
        raise HyperAlignError(
            f"{source.name} has {len(lines)} prompts for {len(firsts)} names; expected one line for each, "
            f"in the names' order ({abridged(list(firsts))}), or a .csv or .jsonl with names and prompts."
        )
    return dict(zip(firsts, lines, strict=True)), ""


def _own_prompts(images: Mapping[str, Path]) -> tuple[dict[str, str], str]:
    """Returns the prompts beside images or in them. Raises HyperAlignError if only some have one."""
    prompts: dict[str, str] = {}
    why: dict[str, str] = {}
    for name, path in images.items():
        prompts[name] = (prompt_beside(path) or "").strip()
        if not prompts[name]:
            found = embedded_prompt(path)
            prompts[name], why[name] = (found.text or "").strip(), found.why or "it is empty"
    missing = [name for name, prompt in prompts.items() if not prompt]
    if 0 < len(missing) < len(prompts):
        raise HyperAlignError(
            f"Found prompts for {len(prompts) - len(missing)} of {len(prompts)} images; none for "
            f"{abridged(missing, why)}. Add theirs, or give all with --prompts."
        )
    return prompts, f"{missing[0]}: {why[missing[0]]}" if missing else ""


def encode(
    paths: Sequence[Path],
    encoding: Encoding,
    max_megabytes: float,
    threads: int,
    progress: Callable[[int], object],
) -> list[str]:
    """Returns images as data URIs, without their metadata, which could contain the method.

    Raises HyperAlignError on an image that cannot be decoded, or on a page above the limit.
    """
    uris: list[str] = []
    size = 0
    with Threads(threads) as encoders:
        for _, uri in encoders.in_order(lambda path: _encode(path, encoding), paths, ahead=2 * threads):
            uris.append(uri)
            size += len(uri)
            progress(1)
            if size > max_megabytes * MEGABYTE:
                whole = size / len(uris) * len(paths) / MEGABYTE
                raise HyperAlignError(
                    f"The page would have about {whole:.0f} MB, more than --max-mb {max_megabytes:g}; lower "
                    f"--side ({encoding.side}) or --quality ({encoding.quality}), take fewer with --sample, "
                    "or raise --max-mb."
                )
    return uris


def _encode(path: Path, encoding: Encoding) -> str:
    try:
        image = open_rgb(path)
    except DECODING_ERRORS as error:
        raise HyperAlignError(
            f"{path} cannot be decoded ({type(error).__name__}: {error}); generate it again, or remove "
            "its name from every folder."
        ) from error
    return data_uri(image, encoding.format, encoding.quality, encoding.side)


def digest(paths: Sequence[Path], texts: Iterator[str]) -> str:
    """Returns an identifier of these images and texts."""
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{text}\0".encode())
    for path in paths:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]
