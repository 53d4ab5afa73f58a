"""Readers of preference images, cut into units that can be read one without the other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hyperalign.errors import HyperAlignError
from train.data.preference.hpd import hpd_source
from train.data.preference.image import Source, UnsafeMark
from train.data.preference.listing import IMAGE_SUFFIXES, folder_source, jsonl_source
from train.data.preference.pickapic import PickAPicParquet, PickAPicTars

__all__ = ["Kind", "UnsafeMark", "guess_kind", "open_source"]

Kind = Literal["auto", "pickapic", "pickapic_tars", "hpd", "folder", "jsonl"]


def open_source(kind: Kind, path: Path, unsafe: UnsafeMark | None = None) -> Source:
    """Opens preference images.

    Args:
        kind: `pickapic` (parquet), `pickapic_tars` (webdataset), `hpd` (train.json and train.tar), `folder`
            (images with .txt captions), `jsonl` ({image, caption}), or `auto` to look at the files.
        path: a file or a folder, as the kind asks.
        unsafe: the data set's own mark of unsafe images; marked ones are left out and named.

    Raises:
        HyperAlignError: nothing there, not of that kind, or the kind has no such marks.
    """
    if not path.exists():
        raise HyperAlignError(f"There is no {path}. Give the file or folder with the preference images.")
    match kind:
        case "auto":
            return open_source(guess_kind(path), path, unsafe)
        case "pickapic":
            return PickAPicParquet(path, unsafe)
        case "pickapic_tars":
            return PickAPicTars(path, unsafe)
        case "hpd":
            return hpd_source(path, unsafe)
        case "jsonl":
            return jsonl_source(path, unsafe)
        case "folder":
            if unsafe is not None:
                raise HyperAlignError(
                    f"A folder of images has no column {unsafe.column!r}. Leave it away, or list the "
                    "images in a .jsonl with that key."
                )
            return folder_source(path)


def guess_kind(path: Path) -> Kind:
    """Returns the kind of a file by its ending, of a folder by what it holds. Raises HyperAlignError."""
    found = {path.suffix.lower()} if path.is_file() else {file.suffix.lower() for file in path.rglob("*")}
    if (path / "train.json").is_file() or (path.is_file() and ".json" in found):
        return "hpd"
    if ".parquet" in found:
        return "pickapic"
    if path.is_file() and ".jsonl" in found:
        return "jsonl"
    if ".tar" in found:
        return "pickapic_tars"
    if path.is_dir() and found & {*IMAGE_SUFFIXES}:
        return "folder"
    raise HyperAlignError(
        f"{path} is none of: a folder of .parquet or .tar files (Pick-a-Pic), with train.json (HPDv2), of "
        "images with .txt captions; or a .jsonl. Name the kind, or another path."
    )
