"""What a preference dataset yields, and how to recognise the images that it marks as unsafe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeAlias, cast

from hyperalign.errors import HyperAlignError

UNSAFE_WORDS = ("true", "yes", "unsafe", "nsfw")
SAFE_WORDS = ("false", "no", "safe", "sfw", "unlikely", "")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A preference image as it is stored: the bytes of a JPEG, PNG or WebP file."""

    caption: str
    data: bytes
    name: str
    """Where it comes from, for messages; unique within a dataset."""
    rejected: bytes | None = None
    """The image that lost against it; None unless the dataset was opened for pairs."""


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class UnsafeImage:
    """An image that is skipped because the dataset marks it as unsafe."""

    name: str


DatasetItem: TypeAlias = ImageFile | BadImage | UnsafeImage


@dataclass(frozen=True, slots=True)
class UnsafeFilter:
    """The column in which a dataset marks unsafe images, and the threshold of its numbers."""

    column: str
    above: float = 0.5
    """Numbers above this are unsafe."""

    def __str__(self) -> str:
        return f"{self.column} > {self.above:g}"

    def matches(self, value: object, where: str) -> bool:
        """Returns whether a value of the column means unsafe; None means safe, NaN unsafe.

        Args:
            value: a flag, a number or a word.
            where: names the row in errors.

        Raises:
            HyperAlignError: any other value.
        """
        if value is None:
            return False
        if isinstance(value, bool):
            return value
        word = value.strip().lower() if isinstance(value, str) else ""
        if isinstance(value, str) and word in UNSAFE_WORDS + SAFE_WORDS:
            return word in UNSAFE_WORDS
        try:
            return not float(cast(Any, value)) <= self.above
        except (TypeError, ValueError) as error:
            raise HyperAlignError(
                f"{where}: {self.column} is {value!r}; expected true or false, a number, or one of "
                f"{', '.join((*UNSAFE_WORDS, *SAFE_WORDS[:-1]))}. Name another column, or change its values."
            ) from error


class UnreadableUnit(HyperAlignError):
    """A whole unit, such as a tar file, cannot be read to its end."""


class PreferenceDataset(Protocol):
    """Preference images in numbered units, each of which is read on its own and becomes one latent shard."""

    def units(self) -> int:
        """Returns the number of units."""
        ...

    def unit_name(self, unit: int) -> str:
        """Returns the name of a unit for messages; it changes if the dataset does."""
        ...

    def read(self, unit: int) -> Iterator[DatasetItem]:
        """Yields the preference images of a unit without ties; unsafe images by name only.

        Raises:
            UnreadableUnit: the unit cannot be read to its end.
        """
        ...


class FirstImages:
    """The first images of a dataset, for a trial; behind the `PreferenceDataset` protocol."""

    def __init__(self, dataset: PreferenceDataset, limit: int) -> None:
        """Reads these images once, to find the unit in which they end.

        Raises:
            HyperAlignError: the limit is below 1.
        """
        if limit < 1:
            raise HyperAlignError(f"--limit is {limit}; expected 1 or more images. Leave it out for all.")
        self.dataset = dataset
        self.counts: list[int] = []
        """Images of each unit; a unit that cannot be read has none."""
        left = limit
        while left and len(self.counts) < dataset.units():
            self.counts.append(_readable(dataset, len(self.counts), left))
            left -= self.counts[-1]
        self.cut = left == 0
        """Whether there may be more images in the last unit."""

    def units(self) -> int:
        """Returns the number of units up to the last of the images."""
        return len(self.counts)

    def unit_name(self, unit: int) -> str:
        """Returns the dataset's name of the unit, with how many of its images are taken if not all may be."""
        name, last = self.dataset.unit_name(unit), unit == self.units() - 1
        return f"{name}, the first {self.counts[unit]}" if last and self.cut else name

    def read(self, unit: int) -> Iterator[DatasetItem]:
        """Yields the images of a unit. Raises UnreadableUnit."""
        last = unit == self.units() - 1
        return islice(self.dataset.read(unit), self.counts[unit] if last and self.cut else None)


def _readable(dataset: PreferenceDataset, unit: int, most: int) -> int:
    try:
        return sum(1 for _ in islice(dataset.read(unit), most))
    except UnreadableUnit:
        return 0  # reading it for encoding says why
