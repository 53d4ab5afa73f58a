"""Makes one HTML file for a blind side-by-side study of images, and counts its votes.

python -m hyperalign study base/ aligned/ --prompts prompts.txt --out study.html
python -m hyperalign study results votes-*.json --key study.key.json

Images are matched by their names in the folders. The page asks the paper's three questions; it needs no
network, shows no method, and is driven with the keyboard. Which method drew which image stands in
study.key.json beside it, and nowhere in the page: give raters the page, keep the key.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import HyperAlignError
from ..score.files import check_writable, write_whole
from ..score.progress import bar
from ..score.prompts import listed
from . import results
from .images import MEGABYTE, Encoding, digest, encode, match, methods_of, prompts_of
from .page import render
from .trials import QUESTIONS, QUESTIONS_WITHOUT_PROMPTS, Key, key_path, plan

STOPPED = 130
"""The exit status of what Ctrl+C ended."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    folders: list[Path]
    prompts: Path | None
    out: Path
    title: str
    seed: int
    sample: int | None
    against_first: bool
    encoding: Encoding
    most_megabytes: float
    threads: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        said = results.run(given[1:]) if given[:1] == ["results"] else build(parse(given))
    except HyperAlignError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("\nStopped; nothing was written.")
        return STOPPED
    sys.stdout.write(f"{said}\n")
    return 0


def build(options: Options) -> str:
    """Writes the page and its key, and returns what was written. Raises HyperAlignError."""
    methods = methods_of(options.folders)
    if named := [method for method in methods if method.casefold() in options.title.casefold().split()]:
        raise HyperAlignError(
            f"The title {options.title!r} names {named[0]!r}, so raters would read it; change it."
        )
    images, left_out = match(methods)
    if left_out:
        say(f"left out {len(left_out)} names that are not in every folder: {listed(left_out)}")
    prompts = prompts_of(images, next(iter(methods.values())), options.prompts)
    prompts = _sampled(prompts, options)
    questions = QUESTIONS if all(prompts.values()) else QUESTIONS_WITHOUT_PROMPTS
    if questions is not QUESTIONS:
        say("found no prompts: the page asks the two questions that need none; give them with --prompts")
    for path in (options.out, key_path(options.out)):
        check_writable(path)
    trials = plan(prompts, list(methods), options.seed, options.against_first)
    places = sorted({(one.name, method) for one in trials for method in (one.first, one.second)})
    paths = [images[name][method] for name, method in places]
    study = digest(paths, (f"{one}" for one in trials))
    random.Random(study).shuffle(places)  # their order in the page says nothing either
    key = Key(study, options.title, options.seed, tuple(methods), tuple(questions), tuple(trials))
    shown = bar(len(places), "images")
    try:
        ordered = [images[name][method] for name, method in places]
        uris = encode(ordered, options.encoding, options.most_megabytes, options.threads, shown.update)
    finally:
        shown.close()
    text = render(key, questions, uris, {place: at for at, place in enumerate(places)})
    # The key comes first: a page without its key could never be counted.
    write_whole(key_path(options.out), lambda partial: partial.write_text(key.to_json(), encoding="utf-8"))
    write_whole(options.out, lambda partial: partial.write_text(text, encoding="utf-8"))
    size = options.out.stat().st_size / MEGABYTE
    return (
        f"Wrote {options.out} ({size:.1f} MB, {len(places)} images, {len(trials)} pairs) and "
        f"{key_path(options.out)}, which tells the methods: keep it from the raters."
    )


def _sampled(prompts: dict[str, str], options: Options) -> dict[str, str]:
    if options.sample is None or options.sample >= len(prompts):
        return prompts
    names = random.Random(options.seed).sample(list(prompts), options.sample)
    return {name: prompts[name] for name in prompts if name in set(names)}


def say(text: str) -> None:
    """Writes a line for people."""
    sys.stderr.write(f"{text}\n")


def parse(arguments: Sequence[str]) -> Options:
    """Returns what the command line asks for; ends the process on a wrong one."""
    parser = argparse.ArgumentParser(
        prog="python -m hyperalign study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folders", type=Path, nargs="+", metavar="DIR", help="images of one method each; two or more")
    add("--prompts", type=Path, metavar="FILE", help="a .csv or .jsonl with names and prompts, or a .txt "
        "with a line per name; default: text files beside the images, or ComfyUI's metadata")  # fmt: skip
    add("--out", type=Path, default=Path("study.html"), metavar="FILE", help="(default: %(default)s)")
    add("--title", default="Image study", help="what raters read; name no method (default: %(default)s)")
    add("--seed", type=int, default=0, help="of sides, order and --sample (default: %(default)s)")
    add("--sample", type=_positive, metavar="N", help="so many names, drawn by the seed (default: all)")
    add(
        "--against-first",
        action="store_true",
        help="compare the first DIR with each other one, not all pairs",
    )
    add("--format", choices=("webp", "jpeg"), default=Encoding().format, help="(default: %(default)s)")
    add("--quality", type=_positive, default=90, help="of the images, 1 to 100 (default: %(default)s)")
    add("--side", type=_positive, default=1024, help="their longer side at most (default: %(default)s)")
    add("--max-mb", type=float, default=200.0, dest="most_megabytes",
        help="refuse to write a larger page (default: %(default)s)")  # fmt: skip
    add("--threads", type=_positive, default=4, help="that encode images (default: %(default)s)")
    found = vars(parser.parse_args(arguments))
    encoding = Encoding(found.pop("format"), min(100, found.pop("quality")), found.pop("side"))
    return Options(encoding=encoding, **found)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
