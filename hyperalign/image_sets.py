"""Generated images of a prompt list on disk, in GenEval's layout, with a record of what made them.

    FOLDER/run.json                   what generated the images, and how long it took
    FOLDER/00000/metadata.jsonl       one line: the prompt and what else its list says about it
    FOLDER/00000/samples/0000.png     its image of the first seed

Folders are numbered as the prompts of the list, images as the seeds. Images of other programs have no
run.json.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from .errors import HyperAlignError
from .files import cannot_write, first_line, write_text

RECORD = "run.json"
FORMAT_VERSION = 1
MAKE_ROOM = "Make room or choose another folder; the same command then goes on where it stopped."
SHOWN = 3
"""How many names an error message lists."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides the images of a run."""

    base: str
    """Name of the base model: tiny, sd15, sdxl, flux or sd3."""
    base_files: str
    """Fingerprint of its configurations and weights."""
    method: str
    """base, S, P, I, static, lora, fine-tuned, best-of-N, epsilon-greedy, zero-order or guidance."""
    method_file: str
    """Name of the hypernetwork, LoRA or fine-tuned model; empty without one."""
    method_sha256: str
    """Of that file; empty without one."""
    options: dict[str, Any]
    """The method's own options, such as its strength, its rewards or the number of candidates."""
    steps: int
    """Sampling steps."""
    guidance_scale: float
    """Of classifier-free guidance; FLUX.1's input guidance."""
    width: int
    """Of the images, in pixels."""
    height: int
    seed: int
    """Of the first image of each prompt; the next ones have the seeds after it."""
    images_per_prompt: int
    prompts: int
    """How many."""
    prompts_sha256: str
    """Of the metadata of all prompts, in their order."""
    precision: str = "float32"
    """Of the base model."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Time of one image, text encoding and decoding included: that of its batch, divided by its images."""

    median: float
    min: float
    max: float
    count: int
    """Images that were measured."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What generated the images of a folder."""

    settings: Settings
    complete: bool = False
    seconds_per_image: Seconds | None = None
    """None until the first images are there."""
    environment: dict[str, Any] = field(default_factory=dict[str, Any])
    """Device, versions, processes and batch size: what decides the time and rounding alone."""
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """The method as a table names it, such as `S (tiny_s.safetensors)`."""
        settings = self.settings
        return f"{settings.method} ({settings.method_file})" if settings.method_file else settings.method


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images of P prompts, the same number S of each."""

    folder: Path
    metadata: list[dict[str, Any]]
    """Of each prompt: at least `prompt`; GenEval's have `tag`, `include` and perhaps `exclude`."""
    images: list[list[Path]]
    """(P, S)."""
    run: RunRecord | None
    """None for images of other programs."""

    @property
    def prompts(self) -> list[str]:
        """The prompts in their order."""
        return [line["prompt"] for line in self.metadata]

    @property
    def name(self) -> str:
        """What made the images, or the folder's name."""
        return self.run.name if self.run else self.folder.name


def metadata_path(folder: Path, prompt: int) -> Path:
    """Returns the file with the metadata of a prompt."""
    return folder / f"{prompt:05d}" / "metadata.jsonl"


def image_path(folder: Path, prompt: int, image: int) -> Path:
    """Returns the file of one image of a prompt."""
    return folder / f"{prompt:05d}" / "samples" / f"{image:04d}.png"


def write_metadata(folder: Path, metadata: Sequence[dict[str, Any]]) -> None:
    """Writes the metadata of all prompts where they are missing or others. Raises HyperAlignError."""
    for prompt, line in enumerate(metadata):
        path, text = metadata_path(folder, prompt), json.dumps(line) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with cannot_write(path, MAKE_ROOM):
                write_text(path, text)


def write_record(folder: Path, record: RunRecord) -> None:
    """Writes a run's record, whole or not at all. Raises HyperAlignError."""
    with cannot_write(folder / RECORD, MAKE_ROOM):
        write_text(folder / RECORD, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def read_record(folder: Path) -> RunRecord | None:
    """Returns the record of a folder's run, None without one. Raises HyperAlignError if it is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format version is {raw['format_version']}, not {FORMAT_VERSION}")
        seconds = raw["seconds_per_image"]
        return RunRecord(
            settings=Settings(**raw["settings"]),
            complete=bool(raw["complete"]),
            seconds_per_image=None if seconds is None else Seconds(**seconds),
            environment=dict(raw["environment"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HyperAlignError(
            f"{path} cannot be read ({first_line(error)}); expected the record of train/generate.py. "
            "Generate the images again into another folder."
        ) from error


def summarise_seconds(seconds: Sequence[float]) -> Seconds | None:
    """Returns the statistics of the seconds of images; None without an image."""
    if not seconds:
        return None
    return Seconds(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def check_same_settings(folder: Path, found: Settings, wanted: Settings) -> None:
    """Raises HyperAlignError unless a folder's images were generated with these settings."""
    old, new = dataclasses.asdict(found), dataclasses.asdict(wanted)
    if changed := [key for key in new if old[key] != new[key]]:
        details = "; ".join(f"{key} was {old[key]} and is now {new[key]}" for key in changed)
        raise HyperAlignError(
            f"{folder} has images of another run: {details}. Choose another folder, or repeat the settings."
        )


def open_image_set(folder: Path) -> ImageSet:
    """Returns the images of a folder, none of which is decoded.

    Raises:
        HyperAlignError: no folder or no image in it, a run that has not finished, a damaged record, prompts
            without metadata or images, or not the same number of images of each.
    """
    if not folder.is_dir():
        raise HyperAlignError(
            f"There is no folder {folder}; expected one that train/generate.py has written."
        )
    run = read_record(folder)
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())
    prompts = run.settings.prompts if run else max(numbers, default=-1) + 1
    images = [_images_of(folder, prompt) for prompt in range(prompts)]
    expected = run.settings.images_per_prompt if run else max(map(len, images), default=0)
    _check_complete(folder, run, images, expected)
    if extra := [f"{number:05d}" for number in numbers if number >= prompts]:
        raise HyperAlignError(
            f"{folder} has the folders {_abridged(extra)}, but its {RECORD} tells of {prompts} prompts. "
            "Remove them, or generate into another folder."
        )
    return ImageSet(folder, [_read_metadata(folder, prompt) for prompt in range(prompts)], images, run)


def check_same_prompts(sets: Sequence[ImageSet]) -> None:
    """Raises HyperAlignError unless all folders have the same prompts in the same order."""
    first = sets[0]
    for other in sets[1:]:
        if len(other.metadata) != len(first.metadata):
            raise HyperAlignError(
                f"{first.folder} has {len(first.metadata)} prompts and {other.folder} {len(other.metadata)}; "
                "expected the same prompts. Generate both from one list."
            )
        for number, (own, theirs) in enumerate(zip(first.prompts, other.prompts, strict=True)):
            if own != theirs:
                raise HyperAlignError(
                    f"Prompt {number:05d} is {own!r} in {first.folder} and {theirs!r} in {other.folder}; "
                    "expected the same prompts. Generate both from one list."
                )


def _images_of(folder: Path, prompt: int) -> list[Path]:
    """Returns the images of a prompt in the order of their numbers, which may have gaps."""
    samples = image_path(folder, prompt, 0).parent
    return sorted(
        (path for path in samples.glob("*.png") if path.stem.isdecimal()), key=lambda p: int(p.stem)
    )


def _check_complete(
    folder: Path, run: RunRecord | None, images: Sequence[Sequence[Path]], expected: int
) -> None:
    if expected == 0:
        raise HyperAlignError(
            f"There are no images in {folder}; expected GenEval's layout, such as 00000/samples/0000.png."
        )
    found, wanted = sum(map(len, images)), expected * len(images)
    if run and not run.complete:
        raise HyperAlignError(
            f"The run in {folder} has not finished: {found} of {wanted} images are there. Run the command "
            "that generates them again; it goes on where it stopped."
        )
    wrong = [number for number, row in enumerate(images) if [int(p.stem) for p in row] != [*range(expected)]]
    if wrong:
        names = _abridged([f"{number:05d}" for number in wrong])
        raise HyperAlignError(
            f"{folder} lacks images of {len(wrong)} of {len(images)} prompts ({names}): {found} of {wanted} "
            f"are there; expected 0000.png to {expected - 1:04d}.png of each. Generate the missing ones."
        )


def _read_metadata(folder: Path, prompt: int) -> dict[str, Any]:
    path = metadata_path(folder, prompt)
    try:
        line: object = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(line, dict):
            raise TypeError("not an object")
        metadata = cast("dict[str, Any]", line)
        if not isinstance(metadata["prompt"], str):
            raise TypeError("its prompt is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HyperAlignError(
            f"{path} cannot be read ({first_line(error)}); expected one JSON object with a prompt. Generate "
            "the images again, or write it."
        ) from error
    return metadata


def _abridged(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
