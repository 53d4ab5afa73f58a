r"""Audits a reward: which groups of images, words of a prompt and properties of pixels does it prefer?

python -m hyperalign audit DIR --reward hpsv2.1 --prompts prompts.csv --groups "gender=woman|man"
python -m hyperalign audit DIR --reward pickscore --template "a photo of a {nurse|doctor}" \
    --groups labels.csv --alter

Images under their own prompts, by group (--prompts, --groups): whom does it like better? The same images
under several prompts (--template): which words does it like better? All images under one prompt, by group
(both): whom does it take for a nurse, whom for a doctor? The same images altered (--alter), and what goes
with brightness, colour, sharpness and size: does it look at more than the subject?
Stop it at any time; the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import HyperAlignError
from ..score.devices import device_of
from ..score.files import Log, check_writable, log_of, write_whole
from ..score.images import BadImage, list_images
from ..score.options import STOPPED, ScoringOptions, scoring_parser
from ..score.progress import bar
from ..score.prompts import find_prompts
from .findings import Finding, findings
from .groups import Groups, filled, groups_of
from .measuring import Cases, Measured, is_measured, measure
from .report import csv_text, html_text, json_text, text


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(ScoringOptions):
    """What the command line asks for."""

    prompts: str | None
    templates: list[str]
    groups: list[str]
    alter: bool
    out: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        found, bad, written = run(parse(arguments))
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped; the scores so far are kept. The same command goes on from there.", file=sys.stderr)
        return STOPPED
    print(text(found))
    for one in bad:
        print(f"left out {one.name}: {one.reason}", file=sys.stderr)
    print(f"\nWrote {', '.join(str(path) for path in written)}.")
    return 0


def run(options: Options) -> tuple[list[Finding], list[BadImage], list[Path]]:
    """Audits; returns what was found, the images left out and the files written. Raises HyperAlignError."""
    names = list_images(options.folder)
    templates = {template: filled(template) for template in options.templates}
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
    with Log(log_of(options.out / "audit"), settings, Measured) as log:
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
        write_whole(path, lambda partial, page=page: partial.write_text(page, encoding="utf-8"))
    return found, bad, paths


def cases_of(options: Options, names: Sequence[str], templates: dict[str, list[str]]) -> Cases:
    """Returns what every image is scored under. Raises HyperAlignError where a prompt is missing."""
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
    shown = bar(len(names), "scoring", len(names) - todo)
    try:
        return measure(
            options.folder, names, cases, rewards, log,
            device=device, batch=options.batch, threads=options.threads, progress=shown.update,
        )  # fmt: skip
    finally:
        shown.close()


def parse(arguments: Sequence[str] | None) -> Options:
    """Returns what the command line asks for; ends the process on a wrong one."""
    parser = scoring_parser("python -m hyperalign audit", __doc__)
    add = parser.add_argument
    add("--prompts", metavar="SOURCE", help="the images' own prompts: a .csv or .jsonl with names and "
        "prompts, `txt` for a text file beside each, or `comfyui` for the metadata of its PNGs")  # fmt: skip
    add("--template", action="append", default=[], dest="templates", metavar="TEXT",
        help="a prompt with terms in braces; every image is scored under each of them")  # fmt: skip
    add("--groups", action="append", default=[], metavar="SOURCE",
        help="a .csv or .jsonl with the images' names and a column for each attribute, or terms to look "
        "for in their own prompts, such as \"gender=woman|man\"")  # fmt: skip
    add("--alter", action="store_true", help="score each image brighter, darker, greyer, blurred ... too")
    add("--out", type=Path, metavar="FOLDER", help="for audit.html, .json and .csv (default: audit in DIR)")
    found = parser.parse_args(arguments)
    found.out = found.out or found.folder / "audit"
    return Options(**vars(found))


if __name__ == "__main__":
    sys.exit(main())
