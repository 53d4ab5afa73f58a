"""`bad.jsonl`: the images that could not be encoded, and the limit on their share."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from hyperalign.errors import HyperAlignError
from hyperalign.files import cannot_write, first_line
from train.data.preference.dataset import BadImage
from train.data.shards import MAX_BAD_SHARE, MIN_READ

logger = logging.getLogger("hyperalign.train")

BAD_FILE = "bad.jsonl"


class BadImages:
    """Lists bad images in a folder of shards and counts them over all runs that filled it."""

    def __init__(self, folder: Path) -> None:
        """Reads the list of earlier runs."""
        self.path = folder / BAD_FILE
        self.seen = 0
        """Images read, in this run or for the finished shards of earlier ones."""
        self.images: list[BadImage] = []
        """Those of them that are bad."""
        self._earlier = self._read()

    def count_finished(self, unit: int, unit_name: str, names: list[str], left_out: int) -> None:
        """Counts the images of a unit that has its shard.

        Args:
            unit: its number.
            unit_name: its name, which is listed if an earlier run could not read the unit.
            names: the images in the shard; those that are listed were repaired since.
            left_out: how many images were skipped as unsafe or too small.
        """
        good = {*names, unit_name}
        bad = [image for name, image in self._earlier.get(unit, {}).items() if name not in good]
        self.images += bad
        self.seen += len(names) + left_out + len(bad)

    def too_many(self) -> bool:
        """Returns whether more than 1 % of the images read so far are bad, and more than one."""
        return len(self.images) > max(1, MAX_BAD_SHARE * self.seen)

    def too_many_early(self) -> bool:
        """Returns whether too many are bad and enough were read for their share to mean anything."""
        return self.seen >= MIN_READ and self.too_many()

    def check(self) -> None:
        """Raises HyperAlignError if too many images are bad."""
        if self.too_many():
            last = self.images[-1]
            raise HyperAlignError(
                f"{len(self.images)} of {self.seen} images are bad; at most 1 % may be. The last is "
                f"{last.name}: {last.reason}. {self.path} lists them and their units: repair or remove them, "
                "delete that file and the shards of these units, then run again."
            )

    def append(self, unit: int, images: Iterable[BadImage], fix: str) -> None:
        """Adds images to the list on the disk.

        Raises:
            HyperAlignError: the file cannot be written; the message ends with `fix`.
        """
        if lines := "".join(json.dumps({"unit": unit} | asdict(image)) + "\n" for image in images):
            with cannot_write(self.path, fix), self.path.open("a", encoding="utf-8") as file:
                file.write(lines)

    def _read(self) -> dict[int, dict[str, BadImage]]:
        """Returns the listed images by unit and name."""
        found: dict[int, dict[str, BadImage]] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
                found.setdefault(row["unit"], {})[row["name"]] = BadImage(row["name"], row["reason"])
            except (ValueError, KeyError, TypeError) as error:  # half a line of a process that was killed
                logger.warning("skipped a line of %s: %s", self.path, first_line(error))
        return found
