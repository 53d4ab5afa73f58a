"""The folders that are compared: their names, that they fit together, and what their images contain."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from hyperalign.image_files import BadImage, decode
from hyperalign.image_sets import ImageSet, check_same_prompts, open_image_set
from hyperalign.threads import Threads

BASE = "base"
SHOWN = 3
"""How many unreadable images an error names."""

Metadata = Mapping[str, Any]
"""What a prompt's metadata.jsonl says: at least `prompt`."""


def open_sets(texts: Sequence[str]) -> dict[str, ImageSet]:
    """Returns the sets of `NAME=FOLDER` texts by name, the base first; no image is decoded.

    The base is the set named `base`, or else the first one.

    Raises:
        HyperAlignError: no set, a text of another form, a name or folder that is given twice, a folder
            without images or with some missing, a run that has not finished, or sets with other prompts or
            seeds.
    """
    folders: dict[str, Path] = {}
    for text in texts:
        name, found, folder = text.partition("=")
        if not (name.strip() and found and folder):
            raise HyperAlignError(f"--sets has {text!r}; expected NAME=FOLDER, such as base=images/base.")
        if name in folders:
            raise HyperAlignError(f"--sets names {name!r} twice; give each set a name of its own.")
        folders[name] = Path(folder)
    if not folders:
        raise HyperAlignError("--sets is empty; expected NAME=FOLDER for each set, the base first.")
    resolved = [folder.resolve() for folder in folders.values()]
    if twice := [str(f) for f in folders.values() if resolved.count(f.resolve()) > 1]:
        raise HyperAlignError(f"--sets has the folder {twice[0]} twice; give each folder once.")
    names = sorted(folders, key=lambda name: name != BASE)  # stable: the others keep their order
    sets = {name: open_image_set(folders[name]) for name in names}
    check_same_prompts(list(sets.values()))
    _check_same_seeds(sets)
    return sets


def _check_same_seeds(sets: Mapping[str, ImageSet]) -> None:
    """Raises HyperAlignError unless image S of every prompt has one seed in all sets, as far as is known."""
    (_, first), *others = sets.items()
    for _, other in others:
        own, theirs = len(first.images[0]), len(other.images[0])
        if own != theirs:
            raise HyperAlignError(
                f"{first.folder} has {own} images of each prompt and {other.folder} {theirs}; expected the "
                "same seeds in both. Generate both with the same number of images per prompt."
            )
        if first.run and other.run and first.run.settings.seed != other.run.settings.seed:
            raise HyperAlignError(
                f"The seeds in {first.folder} begin at {first.run.settings.seed}, those in {other.folder} at "
                f"{other.run.settings.seed}; expected the same seeds, since images are compared in pairs. "
                "Generate one of them again with the other's seed."
            )


def shared_metadata(sets: Mapping[str, ImageSet]) -> list[Metadata]:
    """Returns the prompts' metadata: of the first set that has GenEval's requirements, or else the base."""
    lists: list[list[Metadata]] = [[*one.metadata] for one in sets.values()]
    return next((found for found in lists if all("include" in line for line in found)), lists[0])


def digests_of(paths: Sequence[Path], accelerator: Accelerator, threads: int) -> dict[Path, str]:
    """Returns the SHA-256 of every image file; each process reads and decodes its share of them.

    Raises HyperAlignError, in all processes, if one of them cannot be decoded.
    """
    own = paths[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[Path, str | BadImage]] = []
    bar: tqdm[Any] = tqdm(
        total=len(own), desc="reading images", unit="image", disable=not accelerator.is_main_process
    )
    with Threads(threads) as readers, bar:
        for path, digest in readers.in_order(_digest, own, ahead=2 * threads):
            found.append((path, digest))
            bar.update(1)
    everything = dict(gather_object(found))
    bad = [everything[path] for path in paths if isinstance(everything[path], BadImage)]
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        names = ", ".join(f"{one.name} ({one.reason})" for one in bad[:SHOWN])
        raise HyperAlignError(
            f"{len(bad)} of {len(paths)} images cannot be used: {names}{more}. Nothing was scored. Delete "
            "them and run the command that generates them again; it makes only what is missing."
        )
    return {path: everything[path] for path in paths}


def _digest(path: Path) -> str | BadImage:
    try:
        content = path.read_bytes()
    except OSError as error:
        return BadImage(str(path), f"it cannot be read: {first_line(error)}")
    image = decode(path.parent, path.name)
    return BadImage(str(path), image.reason) if isinstance(image, BadImage) else _sha256(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
