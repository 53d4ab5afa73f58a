"""Readers of preference datasets: Pick-a-Pic, HPD, other parquet files, folders and JSONL lists of images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hyperalign.errors import HyperAlignError
from train.data.parquet import open_parquet
from train.data.preference.dataset import FirstImages, PreferenceDataset, UnsafeFilter
from train.data.preference.hpd import LISTINGS, open_hpd
from train.data.preference.image_list import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    METADATA_FILE,
    open_folder,
    open_imagefolder,
    open_jsonl,
)
from train.data.preference.parquet_images import ChosenParquet, training_files
from train.data.preference.pickapic import PickAPicParquet, PickAPicTars

__all__ = ["DatasetKind", "FirstImages", "UnsafeFilter", "detect_kind", "open_dataset"]

DatasetKind = Literal["auto", "pickapic", "pickapic_tars", "parquet", "hpd", "imagefolder", "folder", "jsonl"]


def open_dataset(
    kind: DatasetKind, path: Path, unsafe: UnsafeFilter | None = None, pairs: bool = False
) -> PreferenceDataset:
    """Opens a preference dataset.

    Args:
        kind: `pickapic` (parquet), `pickapic_tars` (webdataset), `parquet` (columns chosen or image, and a
            caption), `hpd` (train.json of HPDv2 or HPDv3, and the images), `imagefolder` (metadata.jsonl),
            `folder` (images with captions beside them), `jsonl` ({image, caption}), or `auto` to detect it
            from the files.
        path: a file or a folder, depending on the kind.
        unsafe: matching images are skipped; the dataset yields their names only.
        pairs: each image comes with the one that it won against.

    Raises:
        HyperAlignError: nothing is there, it is of another kind, or the kind has no such column or no
            rejected images.
    """
    if not path.exists():
        raise HyperAlignError(f"There is no {path}. Give the file or folder with the preference images.")
    match kind:
        case "auto":
            return open_dataset(detect_kind(path), path, unsafe, pairs)
        case "pickapic":
            return PickAPicParquet(path, unsafe, pairs)
        case "pickapic_tars":
            return PickAPicTars(path, unsafe, pairs)
        case "parquet":
            return ChosenParquet(path, unsafe, pairs)
        case "hpd":
            return open_hpd(path, unsafe, pairs)
        case "imagefolder":
            return open_imagefolder(path, unsafe, pairs)
        case "jsonl":
            return open_jsonl(path, unsafe, pairs)
        case "folder":
            if pairs:
                raise HyperAlignError(
                    f"{path} is a folder of single images; pairs need the image that each won against. List "
                    'them in a .jsonl: {"image": "a.jpg", "rejected": "b.jpg", "caption": "..."}.'
                )
            if unsafe is not None:
                raise HyperAlignError(
                    f"A folder of images has no column {unsafe.column!r}. Do not name a column, or list the "
                    "images in a .jsonl with that key."
                )
            return open_folder(path)


def detect_kind(path: Path) -> DatasetKind:
    """Returns the kind of a file by its suffix, of a folder by its files. Raises HyperAlignError."""
    found = {path.suffix.lower()} if path.is_file() else {file.suffix.lower() for file in path.rglob("*")}
    if any((path / name).is_file() for name in LISTINGS) or (path.is_file() and ".json" in found):
        return "hpd"
    if ".parquet" in found:
        names = open_parquet(training_files(path, ".parquet")[0]).schema_arrow.names
        return "pickapic" if "label_0" in names else "parquet"
    if path.is_file() and ".jsonl" in found:
        return "jsonl"
    if ".tar" in found:
        return "pickapic_tars"
    if any((folder / METADATA_FILE).is_file() for folder in (path, path / "train")):
        return "imagefolder"
    if path.is_dir() and found & {*IMAGE_SUFFIXES}:
        return "folder"
    suffixes = ", ".join(sorted(suffix for suffix in found if suffix)) or "no file"
    raise HyperAlignError(
        f"{path} has {suffixes} and is none of: a folder of .parquet or .tar files (Pick-a-Pic), with "
        f"train.json (HPDv2, HPDv3), with {METADATA_FILE}, of images with captions beside them "
        f"({', '.join(CAPTION_SUFFIXES)}); or a .jsonl. Name the kind, or another path."
    )
