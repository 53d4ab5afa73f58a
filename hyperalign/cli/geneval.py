"""Scores a folder of images in GenEval's layout.

python -m hyperalign geneval IMAGES --metadata evaluation_metadata.jsonl --weights FOLDER

IMAGES has a folder 00000, 00001, ... for each prompt. It contains the images samples/0000.png, ... and
optionally metadata.jsonl with the prompt's line; without it, line N of --metadata is that of folder N. You
can stop it with Ctrl-C; the same command resumes. The results have the official fields.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import HyperAlignError
from ..files import cannot_write, check_writable, file_state, write_text
from ..geneval.prompts import parse_prompt, read_metadata
from ..geneval.scorer import GenEval, load, provide
from ..geneval.summary import summarise, table
from ..image_files import BadImage, decode
from ..threads import Threads
from .common.arguments import command_parser
from .common.devices import device_of
from .common.images import print_skipped
from .common.log import SCORES_ARE_KEPT, Log, log_path
from .common.options import add_weights_options
from .common.progress import progress_bar

AHEAD = 4
"""How many images threads decode ahead."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Whether an image is correct, and what that was computed from."""

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
    """Runs the command and returns the exit status. Raises HyperAlignError."""
    options = parse(arguments)
    rows, bad = run(options)
    summary = summarise((row.metadata["tag"], row.metadata["prompt"], row.correct) for row in rows)
    print_skipped(bad)
    print(table(summary))
    print(f"Wrote {options.out}." + (f" {len(bad)} images were skipped." if bad else ""))
    return 0


def run(options: argparse.Namespace) -> tuple[list[Scored], list[BadImage]]:
    """Scores all images, writes the results and returns them. Raises HyperAlignError."""
    folder: Path = options.images
    images = list_samples(folder, options.metadata)
    check_writable(options.out)
    device = device_of(options.device)
    provide(options.weights, options.tokenizer, options.download)
    with Log(log_path(options.out), {"weights": str(options.weights.resolve())}, Scored) as log:
        todo = {name: line for name, line in images.items() if not is_scored(folder, name, line, log)}
        bad: list[BadImage] = []
        if todo:
            scorer = load(options.weights, device=device, tokenizer_folder=options.tokenizer)
            with progress_bar(len(images), "scoring", len(images) - len(todo)) as bar:
                bad = score_all(folder, todo, scorer, log, bar.update)
        rows = [log.rows[name] for name, line in images.items() if is_scored(folder, name, line, log)]
    with cannot_write(options.out, SCORES_ARE_KEPT):
        write_text(options.out, "".join(json.dumps(official(folder, row)) + "\n" for row in rows))
    return rows, bad


def score_all(
    folder: Path,
    todo: Mapping[str, dict[str, Any]],
    scorer: GenEval,
    log: Log[Scored],
    progress: Callable[[int], object],
) -> list[BadImage]:
    """Scores images, while threads decode the next ones; returns those that could not be read."""
    bad: list[BadImage] = []
    with Threads(AHEAD) as decoders:
        for name, image_CHW in decoders.in_order(partial(decode, folder), todo, ahead=AHEAD):
            if isinstance(image_CHW, BadImage):
                bad.append(image_CHW)
            else:
                verdict, found = scorer.evaluate(image_CHW.float() / 255, parse_prompt(todo[name]))
                details = {kind: [[*one.box, one.score] for one in group] for kind, group in found.items()}
                reason, state = "\n".join(verdict.reasons), file_state(folder / name)
                log.append([Scored(name, todo[name], verdict.correct, reason, details, *state)])
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
    """Yields the folders of prompts."""
    if not folder.is_dir():
        raise HyperAlignError(f"There is no folder {folder}; give one in GenEval's layout.")
    yield from (path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())


def _metadata_of(place: Path, lines: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Returns the metadata of a prompt's folder: its own file's, or its line of --metadata."""
    number, own = int(place.name), place / "metadata.jsonl"
    line = lines[number] if lines is not None and number < len(lines) else None
    kept = read_metadata(own)[0] if own.is_file() else None
    if line is not None and kept is not None and line != kept:
        raise HyperAlignError(
            f"{own} is for {kept['prompt']!r}, line {number} of --metadata (from 0) for {line['prompt']!r}. "
            "Give the file that the images were made from, or omit --metadata."
        )
    found = kept or line
    if found is None:
        raise HyperAlignError(
            f"There is no {own} and no line {number} (from 0) of --metadata; give GenEval's "
            "evaluation_metadata.jsonl with --metadata."
        )
    return found


def is_scored(folder: Path, name: str, metadata: dict[str, Any], log: Log[Scored]) -> bool:
    """Returns whether the log has the result of the current file with this metadata."""
    row = log.current(folder, name)
    return row is not None and row.metadata == metadata


def official(folder: Path, row: Scored) -> dict[str, Any]:
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
    """Returns the options of a command line; ends the process on a wrong one."""
    parser = command_parser("geneval", __doc__)
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder in GenEval's layout")
    add("--metadata", type=Path, metavar="FILE", help="GenEval's evaluation_metadata.jsonl")
    add_weights_options(parser)
    add("--out", type=Path, metavar="FILE", help="results (default: results.jsonl in IMAGES)")
    found = parser.parse_args(arguments)
    found.out = found.out or found.images / "results.jsonl"
    return found
