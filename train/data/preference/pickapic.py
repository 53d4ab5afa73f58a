"""Pick-a-Pic v2: pairs of images of one prompt, as parquet files or as webdataset tars.

`label_0` is 1 if the first image was preferred, 0 if the second was and 0.5 if neither. As in
Diffusion-DPO, ties are dropped. The published dataset has no column for unsafe content; an added column
marks a pair (`nsfw`), or two columns mark its images (`nsfw_0`, `nsfw_1`).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from train.data.preference.dataset import (
    BadImage,
    DatasetItem,
    ImageFile,
    UnreadableUnit,
    UnsafeFilter,
    UnsafeImage,
)
from train.data.preference.parquet_images import ParquetImages, stored_image, training_files

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")
TAR_CAPTIONS = ("original_prompt", "caption", "prompt", "text")
"""Names of the caption in a tar, in order of preference; the first is diffusers' own."""


OTHER = {"jpg_0": "jpg_1", "jpg_1": "jpg_0"}
"""Which image of a pair lost where the other was preferred."""


def preferred(label_0: float | None) -> str | None:
    """Returns which image of a pair was preferred, or None for a tie or an unlabelled pair."""
    return {1.0: "jpg_0", 0.0: "jpg_1"}.get(label_0) if label_0 is not None else None


class PickAPicParquet(ParquetImages):
    """The parquet files of a folder; a unit is a row group."""

    def columns_of(self, names: Sequence[str], unsafe: UnsafeFilter | None) -> list[str]:
        """Returns the columns to read; with two unsafe columns, each marks one image of the pair."""
        return [*COLUMNS, *(_unsafe_columns(unsafe.column, names) if unsafe else [])]

    def image(self, row: Mapping[str, Any], name: str) -> DatasetItem | None:
        """Returns the preference image of a pair, None for a tie."""
        side = preferred(row["label_0"])
        if side is None:
            return None
        unsafe = self.unsafe
        if unsafe is not None and unsafe.matches(_unsafe_value(row, unsafe.column, side), name):
            return UnsafeImage(name)
        columns = [side, OTHER[side]] if self.pairs else [side]
        return stored_image(row["caption"], {column: row[column] for column in columns}, name)


class PickAPicTars:
    """The webdataset tars of a folder; a unit is a tar file.

    A pair is a run of members `KEY.original_prompt.txt`, `KEY.jpg_0.jpg`, `KEY.jpg_1.jpg`,
    `KEY.label_0.txt`, as the conversion script in diffusers' research project on ORPO names them. The
    last endings may be missing, and the caption may be called `caption`, `prompt` or `text`.
    """

    def __init__(self, path: Path, unsafe: UnsafeFilter | None = None, pairs: bool = False) -> None:
        """Lists the files.

        Args:
            path: a tar file, or a folder of them.
            unsafe: images that match are skipped; a member marks pairs, or two members mark their images.
            pairs: each image comes with the other one of its pair.

        Raises:
            HyperAlignError: no tar file.
        """
        self.unsafe, self.pairs = unsafe, pairs
        self.root = path.parent if path.is_file() else path
        self.files = training_files(path, ".tar")

    def units(self) -> int:
        """Returns the number of tar files."""
        return len(self.files)

    def unit_name(self, unit: int) -> str:
        """Returns the file."""
        return self.files[unit].relative_to(self.root).as_posix()

    def read(self, unit: int) -> Iterator[DatasetItem]:
        """Yields the preference image of every pair that is not a tie. Raises UnreadableUnit."""
        path = self.files[unit]
        try:
            with tarfile.open(path, "r:") as tar:
                for key, members in _pairs(tar):
                    found = self._image(tar, members, f"{self.unit_name(unit)}:{key}")
                    if found is not None:
                        yield found
        except (tarfile.TarError, OSError) as error:
            raise UnreadableUnit(f"{path} cannot be read: {first_line(error)}") from error

    def _image(
        self, tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: str
    ) -> DatasetItem | None:
        texts = {
            field: _contents(tar, member).decode("utf-8", "replace").strip()
            for field, member in members.items()
            if not field.startswith("jpg_")
        }
        try:
            side = preferred(float(texts["label_0"]))
        except (KeyError, ValueError):
            return BadImage(name, f"its label_0 is {texts.get('label_0', 'missing')!r}, not 0, 0.5 or 1")
        if side is None:
            return None
        if self.unsafe is not None:
            column = self.unsafe.column.lower()
            if missing := [key for key in _unsafe_columns(column, texts) if key not in texts]:
                raise HyperAlignError(
                    f"{name} has no {', '.join(missing)}, only {', '.join(members)}. Name the column that "
                    "marks unsafe images in these tars, or name none."
                )
            if self.unsafe.matches(_unsafe_value(texts, column, side), name):
                return UnsafeImage(name)
        caption = next((texts[field] for field in TAR_CAPTIONS if field in texts), None)
        needed = [side, OTHER[side]] if self.pairs else [side]
        missing = [field for field in needed if field not in members]
        if caption is None or missing:
            return BadImage(name, f"it has no {'caption' if caption is None else missing[0]}")
        rejected = _contents(tar, members[OTHER[side]]) if self.pairs else None
        return ImageFile(caption, _contents(tar, members[side]), name, rejected)


def _pairs(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yields runs of members of one key, by field: `00012.jpg_0.jpg` is field jpg_0 of 00012."""
    current, members = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        if not member.isfile():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, field = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if key != current and members:
            yield current, members
            members = {}
        current = key
        members[field.lower().partition(".")[0]] = member
    if members:
        yield current, members


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file is not None else b""


def _unsafe_columns(column: str, names: Iterable[str]) -> list[str]:
    """Returns the column that marks pairs; if it is missing, the two that mark the images of a pair."""
    each = [f"{column}_0", f"{column}_1"]
    return each if column not in names and set(each) <= set(names) else [column]


def _unsafe_value(row: Mapping[str, Any], column: str, side: str) -> object:
    return row[column] if column in row else row[f"{column}_{side[-1]}"]
