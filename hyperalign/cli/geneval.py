"""Judges a folder of images in GenEval's layout.

python -m hyperalign.geneval IMAGES --metadata evaluation_metadata.jsonl --weights FOLDER

IMAGES has a folder 00000, 00001, ... for each prompt, in it the images samples/0000.png, ... and perhaps
metadata.jsonl with the prompt's line; without it, line N of --metadata is that of folder N. Stop it at any
time; the same command goes on where it stopped. The results have the official fields.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import HyperAlignError
from ..geneval import detector
from ..geneval.prompts import parse_prompt, read_metadata
from ..geneval.scorer import CLIP, GenEval, load
from ..geneval.summary import summarise, table
from ..rewards import download, loading
from ..rewards.weights import find
from ..threads import in_order
from .score.devices import device_of
from .score.files import Log, check_writable, file_state, log_of, write_whole
from .score.images import BadImage, decode
from .score.progress import bar

STOPPED = 130
AHEAD = 4


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdict on an image, and what it was judged by."""

    name: str
    """Relative to the folder of images."""
    metadata: dict[str, Any]
    correct: bool
    reason: str
    details: dict[str, list[list[float]]]
    """By class, the box and the score of each detection that counted."""
    size: int
    modified: int
    """With `size` the image's `file_state`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse(arguments)
    try:
        rows, bad = run(options)
        summary = summarise((row.metadata["tag"], row.metadata["prompt"], row.correct) for row in rows)
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nStopped; the verdicts so far are kept. The same command goes on from there.", file=sys.stderr
        )
        return STOPPED
    for one in bad:
        print(f"left out {one.name}: {one.reason}", file=sys.stderr)
    print(table(summary))
    print(f"Wrote {options.out}." + (f" {len(bad)} images were left out." if bad else ""))
    return 0


def run(options: argparse.Namespace) -> tuple[list[Judged], list[BadImage]]:
    """Judges all images, writes the results and returns them. Raises HyperAlignError."""
    folder: Path = options.images
    images = list_samples(folder, options.metadata)
    check_writable(options.out)
    device = device_of(options.device)
    if options.download:
        download.download(CLIP, options.weights)
        download.download_file(detector.WEIGHTS.url, options.weights / detector.WEIGHTS.path)
    check_weights(options.weights, options.tokenizer)
    with Log(log_of(options.out), {"weights": str(options.weights.resolve())}, Judged) as log:
        todo = {name: line for name, line in images.items() if not is_judged(folder, name, line, log)}
        bad: list[BadImage] = []
        if todo:
            scorer = load(options.weights, device=device, tokenizer_folder=options.tokenizer)
            shown = bar(len(images), "judging", len(images) - len(todo))
            try:
                bad = judge_all(folder, todo, scorer, log, shown.update)
            finally:
                shown.close()
        rows = [log.rows[name] for name, line in images.items() if is_judged(folder, name, line, log)]
    lines = "".join(json.dumps(official(folder, row)) + "\n" for row in rows)
    write_whole(options.out, lambda partial: partial.write_text(lines, encoding="utf-8"))
    return rows, bad


def judge_all(
    folder: Path,
    todo: Mapping[str, dict[str, Any]],
    scorer: GenEval,
    log: Log[Judged],
    progress: Callable[[int], object],
) -> list[BadImage]:
    """Judges images, while threads decode the next ones; returns those that could not be read."""
    bad: list[BadImage] = []
    with ThreadPoolExecutor(AHEAD) as pool:
        for name, image_CHW in in_order(pool, partial(decode, folder), todo, AHEAD):
            if isinstance(image_CHW, BadImage):
                bad.append(image_CHW)
            else:
                verdict, found = scorer.judge(image_CHW.float() / 255, parse_prompt(todo[name]))
                details = {kind: [[*one.box, one.score] for one in group] for kind, group in found.items()}
                reason, state = "\n".join(verdict.reasons), file_state(folder / name)
                log.append([Judged(name, todo[name], verdict.correct, reason, details, *state)])
            progress(1)
    return bad


def list_samples(folder: Path, metadata: Path | None) -> dict[str, dict[str, Any]]:
    """Returns the metadata of each image by its name, in the official layout's order.

    Raises HyperAlignError when there is no image, or a prompt's metadata is missing, damaged or not
    that of the file given.
    """
    lines = None if metadata is None else read_metadata(metadata)
    found: dict[str, dict[str, Any]] = {}
    for place in sorted(_numbered(folder)):
        samples = [path for path in (place / "samples").glob("*") if re.fullmatch(r"\d+\.png", path.name)]
        if samples:
            line = _metadata_of(place, lines)
            found |= {path.relative_to(folder).as_posix(): line for path in sorted(samples)}
    if not found:
        raise HyperAlignError(
            f"There are no images in {folder}; expected GenEval's layout, such as 00000/samples/0000.png."
        )
    return found


def _numbered(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise HyperAlignError(f"There is no folder {folder}; give one in GenEval's layout.")
    yield from (path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())


def _metadata_of(place: Path, lines: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Returns the metadata of a prompt's folder: its own, or its line."""
    number, own = int(place.name), place / "metadata.jsonl"
    line = lines[number] if lines is not None and number < len(lines) else None
    kept = read_metadata(own)[0] if own.is_file() else None
    if line is not None and kept is not None and line != kept:
        raise HyperAlignError(
            f"{own} is for {kept['prompt']!r}, line {number} of --metadata (from 0) for {line['prompt']!r}. "
            "Give the file that the images were made from, or leave --metadata out."
        )
    found = kept or line
    if found is None:
        raise HyperAlignError(
            f"There is no {own} and no line {number} (from 0) of --metadata; give GenEval's "
            "evaluation_metadata.jsonl with --metadata."
        )
    return found


def check_weights(folder: Path, tokenizer: Path | None) -> None:
    """Raises HyperAlignError unless all weight files are there; reads none of them."""
    find(detector.WEIGHTS, folder)
    recipe = loading.recipe_of(CLIP)
    for file in recipe.files:
        find(file, folder)
    if recipe.vocabulary is not None:
        recipe.vocabulary.load(folder, tokenizer)


def is_judged(folder: Path, name: str, metadata: dict[str, Any], log: Log[Judged]) -> bool:
    """Whether the log has an image with this metadata and as the file is now."""
    row = log.rows.get(name)
    state = file_state(folder / name)
    return row is not None and row.metadata == metadata and (row.size, row.modified) == state


def official(folder: Path, row: Judged) -> dict[str, Any]:
    """Returns a row in the fields of the official results, which the official summary reads."""
    return {
        "filename": str(folder / row.name),
        "tag": row.metadata["tag"],
        "prompt": row.metadata["prompt"],
        "correct": row.correct,
        "reason": row.reason,
        "metadata": json.dumps(row.metadata),
        "details": json.dumps(row.details),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns what the command line asks for; ends the process on a wrong one."""
    parser = argparse.ArgumentParser(
        prog="python -m hyperalign.geneval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder in GenEval's layout")
    add("--metadata", type=Path, metavar="FILE", help="GenEval's evaluation_metadata.jsonl")
    add("--weights", type=Path, default=Path("models/hyperalign_rewards"), metavar="FOLDER",
        help="where the networks' weights lie (default: %(default)s)")  # fmt: skip
    add("--download", action="store_true", help="fetch what is missing of them first")
    add("--tokenizer", type=Path, metavar="FOLDER", help="where CLIP's vocabulary lies, if not there")
    add("--device", help="default: the GPU where there is one")
    add("--out", type=Path, metavar="FILE", help="results (default: results.jsonl in IMAGES)")
    found = parser.parse_args(arguments)
    found.out = found.out or found.images / "results.jsonl"
    return found


if __name__ == "__main__":
    sys.exit(main())
