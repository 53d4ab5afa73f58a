"""Scores a folder of images with reward models; writes a table and a contact sheet.

python -m hyperalign score DIR --prompts prompts.csv --reward hpsv2.1 --weights FOLDER
python -m hyperalign score DIR --prompts comfyui --reward clip --reward aesthetic --sheet sheet.html

You can stop it with Ctrl-C; the same command resumes. A later run scores only images that are new or
changed, or have another prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...errors import HyperAlignError
from ...files import cannot_write, check_writable, write_text
from ...image_files import BadImage, thumbnail
from ...threads import Threads
from ..common.arguments import positive
from ..common.devices import device_of
from ..common.images import list_images, print_skipped
from ..common.log import SCORES_ARE_KEPT, Log, log_path
from ..common.options import ScoringOptions, scoring_parser
from ..common.progress import progress_bar
from ..common.prompts import find_prompts
from .scoring import Scored, is_scored, score_folder
from .sheet import best_first, contact_sheet
from .tables import columns, writer

THUMBNAIL_SIDE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(ScoringOptions):
    """The options of the command line."""

    prompts: str | None
    prompt: str | None
    out: Path
    sheet: Path | None
    sheet_images: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status. Raises HyperAlignError."""
    bad, written = run(parse(arguments))
    print_skipped(bad)
    print(f"Wrote {written}." + (f" {len(bad)} images were skipped." if bad else ""))
    return 0


def run(options: Options) -> tuple[list[BadImage], str]:
    """Scores the images; returns the skipped ones and what was written. Raises HyperAlignError."""
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
    with Log(log_path(options.out), settings, Scored) as log:
        todo = sum(not is_scored(options.folder, name, prompts[name], log) for name in names)
        bad = _score(options, prompts, log, len(names) - todo, device) if todo else []
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
    with progress_bar(len(prompts), "scoring", done) as bar:
        return score_folder(
            options.folder, prompts, rewards, log,
            device=device, batch=options.batch, threads=options.threads, progress=bar.update,
        )  # fmt: skip


def prompts_of(options: Options, names: Sequence[str]) -> dict[str, str]:
    """Returns the images' prompts. Raises HyperAlignError on a missing one, or one that a reward refuses."""
    if options.prompt is not None:
        texts = [options.prompt] * len(names)
    else:
        texts = find_prompts(options.folder, names, options.prompts or "")
    options.check_prompts(texts)
    return dict(zip(names, texts, strict=True))


def write_sheet(options: Options, path: Path, rows: Sequence[Scored], bad: Sequence[BadImage]) -> None:
    """Writes the contact sheet of the best images. Raises HyperAlignError."""
    names = [row.name for row in best_first(rows)[: options.sheet_images]]
    thumbnails: dict[str, str] = {}
    with Threads(options.threads) as decoders, progress_bar(len(names), "thumbnails") as bar:
        make = partial(thumbnail, options.folder, side=THUMBNAIL_SIDE)
        for name, uri in decoders.in_order(make, names, ahead=2 * options.threads):
            if isinstance(uri, str):
                thumbnails[name] = uri
            bar.update(1)
    title = f"{options.folder.resolve().name}: {', '.join(options.rewards)}"
    page = contact_sheet(title, rows, thumbnails, bad)
    with cannot_write(path, SCORES_ARE_KEPT):
        write_text(path, page, errors="backslashreplace")


def parse(arguments: Sequence[str] | None) -> Options:
    """Returns the options of a command line; ends the process on a wrong one."""
    parser = scoring_parser("score", __doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", metavar="SOURCE", help="a .csv or .jsonl of image names and prompts, "
        "`txt` for a text file beside each image, or `comfyui` for what ComfyUI and its "
        "savers, or AUTOMATIC1111, have stored in PNG, WebP and JPEG files")  # fmt: skip
    source.add_argument("--prompt", metavar="TEXT", help="one prompt for all images")
    add("--out", type=Path, metavar="FILE", help="a .csv or .parquet (default: scores.csv in DIR)")
    add("--sheet", type=Path, metavar="FILE", help="HTML page of thumbnails to write, the best first")
    add("--sheet-images", type=positive, default=1000, metavar="N",
        help="number of the best images on it (default: %(default)s)")  # fmt: skip
    found = parser.parse_args(arguments)
    found.out = found.out or found.folder / "scores.csv"
    return Options(**vars(found))
