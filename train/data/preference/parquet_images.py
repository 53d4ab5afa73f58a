"""Images in parquet files: what all such layouts share, and pairs with a chosen and a rejected image."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from train.data.parquet import open_parquet
from train.data.preference.dataset import (
    BadImage,
    DatasetItem,
    ImageFile,
    UnreadableUnit,
    UnsafeFilter,
    UnsafeImage,
)
from train.data.preference.image_list import one_caption
from train.data.prompts import caption_column

logger = logging.getLogger("hyperalign.train")

BATCH_ROWS = 32
CHOSEN_KEYS = ("chosen", "image_chosen", "chosen_image", "jpg_chosen", "image")
"""Columns of the preferred image, in order of preference; the last one is that of single images."""
REJECTED_KEYS = ("rejected", "image_rejected", "rejected_image", "jpg_rejected")


class ParquetImages(ABC):
    """The parquet files of a folder; a unit is a row group."""

    def __init__(self, path: Path, unsafe: UnsafeFilter | None = None, pairs: bool = False) -> None:
        """Reads the files' footers.

        Args:
            path: a parquet file, or a folder of them.
            unsafe: images that match are skipped; its column marks rows.
            pairs: each image comes with the one that it won against.

        Raises:
            HyperAlignError: no parquet file, a broken one, or a missing column.
        """
        self.columns: list[str] = []
        self.unsafe, self.pairs = unsafe, pairs
        self.root = path.parent if path.is_file() else path
        self.groups: list[tuple[Path, int]] = []
        for file in training_files(path, ".parquet"):
            parquet = open_parquet(file)
            names = parquet.schema_arrow.names
            self.columns = self.columns_of(names, unsafe)
            missing = [name for name in self.columns if name not in names]
            if missing:
                raise HyperAlignError(
                    f"{file} has no column {', '.join(missing)}; its columns are "
                    f"{', '.join(names)}. Use the files with images, or another kind of dataset."
                )
            self.groups += [(file, group) for group in range(parquet.num_row_groups)]

    @abstractmethod
    def columns_of(self, names: Sequence[str], unsafe: UnsafeFilter | None) -> list[str]:
        """Returns the columns to read of a file's. Raises HyperAlignError."""

    @abstractmethod
    def image(self, row: Mapping[str, Any], name: str) -> DatasetItem | None:
        """Returns the preference image of a row, None for a tie. Raises HyperAlignError."""

    def units(self) -> int:
        """Returns the number of row groups."""
        return len(self.groups)

    def unit_name(self, unit: int) -> str:
        """Returns file and row group."""
        file, group = self.groups[unit]
        return f"{file.relative_to(self.root).as_posix()}:{group}"

    def read(self, unit: int) -> Iterator[DatasetItem]:
        """Yields the preference image of every row that is not a tie. Raises UnreadableUnit."""
        import pyarrow as pa

        file, group = self.groups[unit]
        number = -1
        try:
            for batch in open_parquet(file).iter_batches(BATCH_ROWS, [group], self.columns):
                for row in batch.to_pylist():
                    number += 1
                    found = self.image(row, f"{self.unit_name(unit)}:{number}")
                    if found is not None:
                        yield found
        except (pa.ArrowException, OSError) as error:
            raise UnreadableUnit(f"{file}, row group {group} cannot be read: {first_line(error)}") from error


class ChosenParquet(ParquetImages):
    """Parquet files with the preferred image in a column `chosen`, or with single images, and a caption."""

    def columns_of(self, names: Sequence[str], unsafe: UnsafeFilter | None) -> list[str]:
        """Returns the columns of the image, the caption and the unsafe mark."""
        chosen = next((key for key in CHOSEN_KEYS if key in names), None)
        if chosen is None:
            raise HyperAlignError(
                f"The parquet files have the columns {', '.join(names)}; expected the preferred image in one "
                f"of {', '.join(CHOSEN_KEYS)}, or Pick-a-Pic's jpg_0, jpg_1 and label_0. Rename the column."
            )
        rejected = next((key for key in REJECTED_KEYS if key in names), None)
        if self.pairs and rejected is None:
            raise HyperAlignError(
                f"The parquet files have the columns {', '.join(names)}; pairs need the image that lost in "
                f"one of {', '.join(REJECTED_KEYS)}. Rename its column, or encode single images without "
                "--pairs."
            )
        columns = [chosen, caption_column(names, "The parquet file"), *([unsafe.column] if unsafe else [])]
        return [*columns, rejected] if self.pairs and rejected is not None else columns

    def image(self, row: Mapping[str, Any], name: str) -> DatasetItem | None:
        """Returns the preferred image of a row."""
        if self.unsafe is not None and self.unsafe.matches(row[self.unsafe.column], name):
            return UnsafeImage(name)
        chosen, caption = self.columns[:2]
        try:
            text = None if row[caption] is None else one_caption({"caption": row[caption]}, name, name)
        except HyperAlignError as error:
            return BadImage(name, str(error))
        columns = [chosen, self.columns[-1]] if self.pairs else [chosen]
        return stored_image(text, {column: row[column] for column in columns}, name)


def stored_image(caption: str | None, cells: Mapping[str, object], name: str) -> ImageFile | BadImage:
    """Returns the image in the first cell, and in the second the one that lost, if there are two.

    A cell has the bytes of an image file, or `datasets`' {bytes, path}.
    """
    if caption is None:
        return BadImage(name, "its caption is null")
    found: list[bytes] = []
    for column, value in cells.items():
        data = cast("dict[str, Any]", value).get("bytes") if isinstance(value, dict) else value
        if data is None:
            return BadImage(name, f"its {column} is null")
        if not isinstance(data, bytes):
            kind = type(value).__name__
            return BadImage(
                name, f"its {column} is a {kind}; expected the bytes of an image file, or an Image"
            )
        found.append(data)
    return ImageFile(caption, found[0], name, found[1] if len(found) > 1 else None)


def training_files(path: Path, suffix: str) -> list[Path]:
    """Returns a file, or the sorted files of a folder; of a folder with splits only the training split.

    The validation and test prompts of Pick-a-Pic measure models, so nothing is trained on them.
    """
    if path.is_file():
        return [path]
    files = sorted(path.rglob(f"*{suffix}"))
    if not files:
        raise HyperAlignError(f"{path} holds no {suffix} file. Give the folder with the downloaded files.")
    train = [file for file in files if file.name.startswith("train")]
    if train and len(train) < len(files):
        logger.info("%s: skipped %d files of other splits than train", path, len(files) - len(train))
    return train or files
