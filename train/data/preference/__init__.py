"""Readers of preference datasets: Pick-a-Pic, HPDv2, folders and JSONL lists of images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hyperalign.errors import HyperAlignError
from train.data.preference.dataset import PreferenceDataset, UnsafeFilter
from train.data.preference.hpd import open_hpd
from train.data.preference.image_list import IMAGE_SUFFIXES, open_folder, open_jsonl
from train.data.preference.pickapic import PickAPicParquet, PickAPicTars

__all__ = ["DatasetKind", "UnsafeFilter", "detect_kind", "open_dataset"]

DatasetKind = Literal["auto", "pickapic", "pickapic_tars", "hpd", "folder", "jsonl"]


def open_dataset(kind: DatasetKind, path: Path, unsafe: UnsafeFilter | None = None) -> PreferenceDataset:
    """Opens a preference dataset.

    Args:
        kind: `pickapic` (parquet), `pickapic_tars` (webdataset), `hpd` (train.json and train.tar), `folder`
            (images with .txt captions), `jsonl` ({image, caption}), or `auto` to detect it from the files.
        path: a file or a folder, depending on the kind.
        unsafe: matching images are skipped; the dataset yields their names only.

    Raises:
        HyperAlignError: nothing is there, it is of another kind, or the kind has no such column.
    """
    if not path.exists():
        raise HyperAlignError(f"There is no {path}. Give the file or folder with the preference images.")
    match kind:
        case "auto":
            return open_dataset(detect_kind(path), path, unsafe)
        case "pickapic":
            return PickAPicParquet(path, unsafe)
        case "pickapic_tars":
            return PickAPicTars(path, unsafe)
        case "hpd":
            return open_hpd(path, unsafe)
        case "jsonl":
            return open_jsonl(path, unsafe)
        case "folder":
            if unsafe is not None:
                raise HyperAlignError(
                    f"A folder of images has no column {unsafe.column!r}. Do not name a column, or list the "
                    "images in a .jsonl with that key."
                )
            return open_folder(path)


def detect_kind(path: Path) -> DatasetKind:
    """Returns the kind of a file by its suffix, of a folder by its files. Raises HyperAlignError."""
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
