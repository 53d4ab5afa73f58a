r"""Measures which groups of images, words of a prompt and properties of pixels a reward model prefers.

python -m hyperalign audit DIR --reward hpsv2.1 --prompts prompts.csv --groups "gender=woman|man"
python -m hyperalign audit DIR --reward pickscore --template "a photo of a {nurse|doctor}" \
    --groups labels.csv --alter

--prompts and --groups compare groups of images, each image under its own prompt. --template compares prompts,
all of them with the same images. --template and --groups compare groups of images under one prompt. --alter
compares images with altered copies of them. Every audit correlates the score with brightness, colour,
sharpness and size.
You can stop it with Ctrl-C; the same command resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import HyperAlignError
from ...files import cannot_write, check_writable, write_text
from ...image_files import BadImage
from ..common.devices import device_of
from ..common.images import list_images, print_skipped
from ..common.log import SCORES_ARE_KEPT, Log, log_path
from ..common.options import ScoringOptions, scoring_parser
from ..common.progress import progress_bar
from ..common.prompts import find_prompts
from .findings import Finding, findings
from .groups import Groups, expand, groups_of
from .measuring import Cases, Measured, is_measured, measure
from .report import csv_text, html_text, json_text, text


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(ScoringOptions):
    """The options of the command line."""

    prompts: str | None
    templates: list[str]
    groups: list[str]
    alter: bool
    out: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status. Raises HyperAlignError."""
    found, bad, written = run(parse(arguments))
    print(text(found))
    print_skipped(bad)
    print(f"\nWrote {', '.join(str(path) for path in written)}.")
    return 0


def run(options: Options) -> tuple[list[Finding], list[BadImage], list[Path]]:
    """Audits; returns the findings, the skipped images and the files written. Raises HyperAlignError."""
    names = list_images(options.folder)
    templates = {template: expand(template) for template in options.templates}
    cases = cases_of(options, names, templates)
    groups: Groups = {}
    for source in options.groups:
        groups |= groups_of(source, cases.own, names)
    options.check_rewards()
    options.check_prompts([*cases.own.values(), *cases.texts])
    device = device_of(options.device)
    paths = [options.out / f"audit.{kind}" for kind in ("html", "json", "csv")]
    for path in paths:
        check_writable(path)
    options.provide_files()
    settings = {
        "rewards": options.rewards, "dtype": options.dtype, "weights": str(options.weights.resolve()),
        "texts": list(cases.texts), "altered": options.alter,
    }  # fmt: skip
    with Log(log_path(options.out / "audit"), settings, Measured) as log:
        bad = _measure(options, names, cases, log, device)
        rows = [log.rows[name] for name in names if is_measured(options.folder, name, cases, log)]
    if not rows:
        raise HyperAlignError(
            f"None of the {len(names)} images could be scored; {bad[0].name}: {bad[0].reason}. Check them."
        )
    found = [
        finding
        for reward in options.rewards
        for finding in findings(rows, reward, groups, templates, options.alter)
    ]
    title = (
        f"Audit of {', '.join(options.rewards)} over {len(rows)} images of {options.folder.resolve().name}"
    )
    pages = (html_text(title, found, bad), json_text(found, settings), csv_text(found))
    for path, page in zip(paths, pages, strict=True):
        with cannot_write(path, SCORES_ARE_KEPT):
            write_text(path, page)
    return found, bad, paths


def cases_of(options: Options, names: Sequence[str], templates: dict[str, list[str]]) -> Cases:
    """Returns the prompts that every image is scored under. Raises HyperAlignError on a missing prompt."""
    if options.prompts is None and not templates:
        raise HyperAlignError(
            "There is no prompt to score the images under; give --prompts, or --template with terms in "
            "braces: 'a photo of a {cat|dog}'."
        )
    own: dict[str, str] = {}
    if options.prompts is not None:
        own = dict(zip(names, find_prompts(options.folder, names, options.prompts), strict=True))
    texts = dict.fromkeys(text for texts in templates.values() for text in texts)
    return Cases(own, list(texts), options.alter)


def _measure(
    options: Options, names: Sequence[str], cases: Cases, log: Log[Measured], device: torch.device
) -> list[BadImage]:
    todo = sum(not is_measured(options.folder, name, cases, log) for name in names)
    if not todo:
        return []
    rewards = options.load(device)
    with progress_bar(len(names), "scoring", len(names) - todo) as bar:
        return measure(
            options.folder, names, cases, rewards, log,
            device=device, batch=options.batch, threads=options.threads, progress=bar.update,
        )  # fmt: skip


def parse(arguments: Sequence[str] | None) -> Options:
    """Returns the options of a command line; ends the process on a wrong one."""
    parser = scoring_parser("audit", __doc__)
    add = parser.add_argument
    add("--prompts", metavar="SOURCE", help="the images' own prompts: a .csv or .jsonl of image names and "
        "prompts, `txt` for a text file beside each image, or `comfyui` for what ComfyUI and its "
        "savers, or AUTOMATIC1111, have stored in PNG, WebP and JPEG files")  # fmt: skip
    add("--template", action="append", default=[], dest="templates", metavar="TEXT",
        help="a prompt with terms in braces; every image is scored under each of them")  # fmt: skip
    add("--groups", action="append", default=[], metavar="SOURCE",
        help="a .csv or .jsonl of the images' names with a column for each attribute, or terms to find in "
        "the images' own prompts, such as \"gender=woman|man\"")  # fmt: skip
    add("--alter", action="store_true",
        help="also score copies of each image: brighter, darker, greyer, blurred ...")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="for audit.html, .json and .csv (default: audit in DIR)")
    found = parser.parse_args(arguments)
    found.out = found.out or found.folder / "audit"
    return Options(**vars(found))
