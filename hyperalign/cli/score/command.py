"""Scores a folder of images into a table and a contact sheet.

python -m hyperalign score DIR --prompts prompts.csv --reward hpsv2.1 --weights FOLDER
python -m hyperalign score DIR --prompts comfyui --reward clip --reward aesthetic --sheet sheet.html

Stop it at any time; the same command goes on where it stopped. A later run scores only images that are
new or changed, or whose prompt is another.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...errors import HyperAlignError
from ...threads import in_order
from .devices import device_of
from .files import Log, Scored, check_writable, log_of, write_whole
from .images import BadImage, list_images, thumbnail
from .options import STOPPED, ScoringOptions, positive, scoring_parser
from .progress import bar
from .prompts import find_prompts
from .scoring import is_scored, score_folder
from .sheet import best_first, contact_sheet
from .tables import columns, writer

THUMBNAIL_SIDE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(ScoringOptions):
    """What the command line asks for."""

    prompts: str | None
    prompt: str | None
    out: Path
    sheet: Path | None
    sheet_images: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        bad, written = run(parse(arguments))
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped; the scores so far are kept. The same command goes on from there.", file=sys.stderr)
        return STOPPED
    for one in bad:
        print(f"left out {one.name}: {one.reason}", file=sys.stderr)
    print(f"Wrote {written}." + (f" {len(bad)} images were left out." if bad else ""))
    return 0


def run(options: Options) -> tuple[list[BadImage], str]:
    """Scores, and returns the images left out and what was written. Raises HyperAlignError."""
    names = list_images(options.folder)
    write = writer(options.out)
    for path in (options.out, options.sheet):
        if path is not None:
            check_writable(path)
    device = device_of(options.device)
    options.check_rewards()
    prompts = prompts_of(options, names)
    options.provide_files()
    settings = {"rewards": options.rewards, "dtype": options.dtype, "weights": str(options.weights.resolve())}
    with Log(log_of(options.out), settings, Scored) as log:
        todo = sum(not is_scored(options.folder, name, prompts[name], log) for name in names)
        bad: list[BadImage] = []
        if todo:
            bad = _score(options, prompts, log, len(names) - todo, device)
        rows = [log.rows[name] for name in names if is_scored(options.folder, name, prompts[name], log)]
    if not rows:
        raise HyperAlignError(
            f"None of the {len(names)} images could be scored; {bad[0].name}: {bad[0].reason}. Check them."
        )
    write(columns(rows, options.rewards))
    if options.sheet is None:
        return bad, f"{len(rows)} scores to {options.out}"
    write_sheet(options, options.sheet, rows, bad)
    return bad, f"{len(rows)} scores to {options.out} and {options.sheet}"


def _score(
    options: Options, prompts: dict[str, str], log: Log[Scored], done: int, device: torch.device
) -> list[BadImage]:
    rewards = options.load(device)
    shown = bar(len(prompts), "scoring", done)
    try:
        return score_folder(
            options.folder, prompts, rewards, log,
            device=device, batch=options.batch, threads=options.threads, progress=shown.update,
        )  # fmt: skip
    finally:
        shown.close()


def prompts_of(options: Options, names: Sequence[str]) -> dict[str, str]:
    """Returns each image's prompt. Raises HyperAlignError where one is missing or a reward refuses it."""
    if options.prompt is not None:
        texts = [options.prompt] * len(names)
    else:
        texts = find_prompts(options.folder, names, options.prompts or "")
    options.check_prompts(texts)
    return dict(zip(names, texts, strict=True))


def write_sheet(options: Options, path: Path, rows: Sequence[Scored], bad: Sequence[BadImage]) -> None:
    """Writes the contact sheet of the best images."""
    names = [row.name for row in best_first(rows)[: options.sheet_images]]
    shown = bar(len(names), "thumbnails")
    thumbnails: dict[str, str] = {}
    with ThreadPoolExecutor(options.threads) as pool:
        make = partial(thumbnail, options.folder, side=THUMBNAIL_SIDE)
        for name, uri in in_order(pool, make, names, 2 * options.threads):
            if isinstance(uri, str):
                thumbnails[name] = uri
            shown.update(1)
    shown.close()
    title = f"{options.folder.resolve().name}: {', '.join(options.rewards)}"
    page = contact_sheet(title, rows, thumbnails, bad)
    write_whole(path, lambda partial: partial.write_text(page, encoding="utf-8", errors="backslashreplace"))


def parse(arguments: Sequence[str] | None) -> Options:
    """Returns what the command line asks for; ends the process on a wrong one."""
    parser = scoring_parser("python -m hyperalign score", __doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", metavar="SOURCE", help="a .csv or .jsonl with names and prompts, "
        "`txt` for a text file beside each image, or `comfyui` for the metadata of its PNGs")  # fmt: skip
    source.add_argument("--prompt", metavar="TEXT", help="one prompt for all images")
    add("--out", type=Path, metavar="FILE", help="a .csv or .parquet (default: scores.csv in DIR)")
    add("--sheet", type=Path, metavar="FILE", help="an HTML page of thumbnails, the best first")
    add("--sheet-images", type=positive, default=1000, metavar="N",
        help="how many of the best it shows (default: %(default)s)")  # fmt: skip
    found = parser.parse_args(arguments)
    found.out = found.out or found.folder / "scores.csv"
    return Options(**vars(found))


if __name__ == "__main__":
    sys.exit(main())
