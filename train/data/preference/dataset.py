"""What a source of preference images is, and how an encoded image becomes pixels."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

from PIL import Image, ImageOps

from hyperalign.errors import HyperAlignError

DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise when they meet damaged files."""
UNSAFE_WORDS = ("true", "yes", "unsafe", "nsfw")
SAFE_WORDS = ("false", "no", "safe", "sfw", "unlikely", "")


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A preference image as it lies on the disk: the bytes of a JPEG, PNG or WebP file."""

    caption: str
    data: bytes
    name: str
    """Where it comes from, for messages; distinct within a source."""


@dataclass(frozen=True, slots=True)
class PreferenceImage:
    """A preference image in RGB, upright."""

    caption: str
    image: Image.Image
    name: str


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unsafe:
    """An image that is left out because the data set's own mark says that it is unsafe."""

    name: str


@dataclass(frozen=True, slots=True)
class UnsafeMark:
    """The data set's own mark of unsafe images, and from where on it counts."""

    column: str
    above: float = 0.5
    """Numbers above this are unsafe."""

    def __str__(self) -> str:
        return f"{self.column} > {self.above:g}"

    def flags(self, mark: object, where: str) -> bool:
        """Says whether a mark (a flag, a number or a word) means unsafe; none and NaN: no and yes.

        Raises:
            HyperAlignError: another kind of mark.
        """
        if mark is None:
            return False
        if isinstance(mark, bool):
            return mark
        word = mark.strip().lower() if isinstance(mark, str) else ""
        if isinstance(mark, str) and word in UNSAFE_WORDS + SAFE_WORDS:
            return word in UNSAFE_WORDS
        try:
            return not float(cast(Any, mark)) <= self.above
        except (TypeError, ValueError) as error:
            raise HyperAlignError(
                f"{where}: {self.column} is {mark!r}; expected true or false, a number, or one of "
                f"{', '.join((*UNSAFE_WORDS, *SAFE_WORDS[:-1]))}. Name another column, or change the marks."
            ) from error


Found: TypeAlias = EncodedImage | BadImage | Unsafe
"""What a source yields."""


class BrokenUnit(HyperAlignError):
    """A whole unit, such as a tar file, cannot be read to its end."""


class Source(Protocol):
    """Preference images, cut into numbered units that can be read one without the other."""

    def units(self) -> int:
        """Returns how many units there are."""
        ...

    def unit_name(self, unit: int) -> str:
        """Returns what the unit is called in messages; it changes if the source does."""
        ...

    def read(self, unit: int) -> Iterator[Found]:
        """Yields the preference images of a unit, ties left out and unsafe ones only named.

        Raises:
            BrokenUnit: the unit cannot be read to its end.
        """
        ...


def decode(image: EncodedImage) -> PreferenceImage | BadImage:
    """Returns the image in RGB: turned upright, transparency laid on white."""
    if not image.caption.strip():
        return BadImage(image.name, "its caption is empty")
    try:
        with Image.open(io.BytesIO(image.data)) as opened:
            decoded = _on_white(ImageOps.exif_transpose(opened))
    except DAMAGED as error:
        return BadImage(image.name, f"it cannot be decoded: {type(error).__name__}: {error}")
    return PreferenceImage(image.caption.strip(), decoded, image.name)


def read_images(source: Source, unit: int) -> Iterator[PreferenceImage | BadImage]:
    """Yields the decoded images of a unit, unsafe ones left out. Raises BrokenUnit."""
    for found in source.read(unit):
        if not isinstance(found, Unsafe):
            yield found if isinstance(found, BadImage) else decode(found)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
