"""Datasets that list single image files: a folder, a JSONL file, HPDv2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from hyperalign.errors import HyperAlignError
from train.data.preference.dataset import BadImage, DatasetItem, ImageFile, UnsafeFilter, UnsafeImage
from train.data.prompts import caption_of, json_lines

ENTRIES_PER_UNIT = 1000
"""An interruption costs the work on one unit, a few minutes."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class ImageList(Generic[Entry]):
    """A list of entries, each read on its own; a unit is ENTRIES_PER_UNIT of them."""

    name: str
    entries: Sequence[Entry]
    read_entry: Callable[[Entry], DatasetItem]

    def units(self) -> int:
        """Returns the number of units; the last one may be shorter."""
        return -(-len(self.entries) // ENTRIES_PER_UNIT)

    def unit_name(self, unit: int) -> str:
        """Returns the range of entries."""
        first, last = unit * ENTRIES_PER_UNIT, min((unit + 1) * ENTRIES_PER_UNIT, len(self.entries))
        return f"{self.name}[{first}:{last}]"

    def read(self, unit: int) -> Iterator[DatasetItem]:
        """Yields the images of a unit."""
        for entry in self.entries[unit * ENTRIES_PER_UNIT : (unit + 1) * ENTRIES_PER_UNIT]:
            yield self.read_entry(entry)


@dataclass(frozen=True, slots=True)
class CaptionedFile:
    """An image file and its caption."""

    caption: str
    file: Path
    name: str
    unsafe: bool = False
    """Whether the dataset marks it as unsafe."""


def read_file(entry: CaptionedFile) -> DatasetItem:
    """Reads an image file unless it is unsafe; a file that cannot be read gives a BadImage."""
    if entry.unsafe:
        return UnsafeImage(entry.name)
    try:
        return ImageFile(entry.caption, entry.file.read_bytes(), entry.name)
    except OSError as error:
        return BadImage(entry.name, f"{entry.file} cannot be read: {error.strerror}")


def open_folder(path: Path) -> ImageList[Path]:
    """Returns the images of a folder and its subfolders, each captioned by the `.txt` of its name.

    Raises:
        HyperAlignError: no image in it.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise HyperAlignError(
            f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}). Each needs a .txt of the same name."
        )

    def read(file: Path) -> DatasetItem:
        name, caption = file.relative_to(path).as_posix(), file.with_suffix(".txt")
        try:
            text = caption.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            return BadImage(name, f"its caption {caption.name} cannot be read: {error}")
        return read_file(CaptionedFile(text, file, name))

    return ImageList(path.name, files, read)


def open_jsonl(path: Path, unsafe: UnsafeFilter | None = None) -> ImageList[CaptionedFile]:
    """Returns the images of a JSONL file with objects {image, caption | prompt | text}.

    Args:
        path: the file; relative image paths start at its folder.
        unsafe: images that match are skipped; its column is a key of the objects.

    Raises:
        HyperAlignError: a bad line, named by its number, or no line at all.
    """
    entries: list[CaptionedFile] = []
    for number, row in json_lines(path):
        where = f"{path}, line {number}"
        image = entry_value(row, "image", str, where)
        marked = unsafe is not None and unsafe.matches(entry_value(row, unsafe.column, object, where), where)
        name = f"{path.name}:{number}:{image}"
        entries.append(CaptionedFile(caption_of(row, where), path.parent / image, name, marked))
    if not entries:
        raise HyperAlignError(f'{path} is empty. Each line should be {{"image": "a.jpg", "caption": "..."}}.')
    return ImageList(path.name, entries, read_file)


def entry_value(row: object, key: str, kind: type[Any], where: str) -> Any:
    """Returns a value of a JSON object. Raises HyperAlignError if it is missing or of another type."""
    if not isinstance(row, dict):
        raise HyperAlignError(f"{where} is a {type(row).__name__}; expected an object with {key!r}.")
    table = cast("dict[str, Any]", row)
    if key not in table:
        raise HyperAlignError(f"{where} has no {key!r}, only {', '.join(table) or 'nothing'}. Add it.")
    if not isinstance(table[key], kind):
        raise HyperAlignError(f"{where}: {key!r} is {table[key]!r}; expected a {kind.__name__}.")
    return table[key]
