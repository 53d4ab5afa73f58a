"""Sources that list single images: a folder, a JSONL file, HPDv2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from hyperalign.errors import HyperAlignError
from train.data.preference.image import BadImage, EncodedImage, Found, Unsafe, UnsafeMark
from train.data.prompts import caption_of, json_lines

PER_UNIT = 1000
"""Entries in a unit: minutes of work that an interruption may cost."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class Listing(Generic[Entry]):
    """A list of entries, each read on its own; a unit is PER_UNIT of them."""

    name: str
    entries: Sequence[Entry]
    read_entry: Callable[[Entry], Found]

    def units(self) -> int:
        """Returns the number of thousands begun."""
        return -(-len(self.entries) // PER_UNIT)

    def unit_name(self, unit: int) -> str:
        """Returns the range of entries."""
        first, last = unit * PER_UNIT, min((unit + 1) * PER_UNIT, len(self.entries))
        return f"{self.name}[{first}:{last}]"

    def read(self, unit: int) -> Iterator[Found]:
        """Yields the images of a unit."""
        for entry in self.entries[unit * PER_UNIT : (unit + 1) * PER_UNIT]:
            yield self.read_entry(entry)


@dataclass(frozen=True, slots=True)
class Captioned:
    """An image file and its caption."""

    caption: str
    file: Path
    name: str
    unsafe: bool = False
    """Whether the data set marks it as unsafe."""


def read_file(entry: Captioned) -> Found:
    """Reads an image file, unless it is unsafe; one that cannot be read is a bad image."""
    if entry.unsafe:
        return Unsafe(entry.name)
    try:
        return EncodedImage(entry.caption, entry.file.read_bytes(), entry.name)
    except OSError as error:
        return BadImage(entry.name, f"{entry.file} cannot be read: {error.strerror}")


def folder_source(path: Path) -> Listing[Path]:
    """Returns the images of a folder and its subfolders, each captioned by the `.txt` of its name.

    Raises:
        HyperAlignError: no image in it.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise HyperAlignError(
            f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}). Each needs a .txt of the same name."
        )

    def read(file: Path) -> Found:
        name, caption = file.relative_to(path).as_posix(), file.with_suffix(".txt")
        try:
            text = caption.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            return BadImage(name, f"its caption {caption.name} cannot be read: {error}")
        return read_file(Captioned(text, file, name))

    return Listing(path.name, files, read)


def jsonl_source(path: Path, unsafe: UnsafeMark | None = None) -> Listing[Captioned]:
    """Returns the images of a JSONL file with objects {image, caption | prompt | text}.

    Args:
        path: the file; relative image paths start at its folder.
        unsafe: key that marks unsafe images, which are then left out.

    Raises:
        HyperAlignError: a bad line, named by its number, or no line at all.
    """
    entries: list[Captioned] = []
    for number, row in json_lines(path):
        where = f"{path}, line {number}"
        image = entry_value(row, "image", str, where)
        marked = unsafe is not None and unsafe.flags(entry_value(row, unsafe.column, object, where), where)
        name = f"{path.name}:{number}:{image}"
        entries.append(Captioned(caption_of(row, where), path.parent / image, name, marked))
    if not entries:
        raise HyperAlignError(f'{path} is empty. Each line should be {{"image": "a.jpg", "caption": "..."}}.')
    return Listing(path.name, entries, read_file)


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
