"""Makes one HTML file for a blind side-by-side study of images, and counts its votes.

python -m hyperalign study base/ aligned/ --prompts prompts.txt --out study.html
python -m hyperalign study results votes-*.json --key study.key.json

Images of the folders are matched by name. The page asks the paper's three questions. It needs no network,
does not show the methods, and can be used with the keyboard alone. Only study.key.json beside it contains
which method generated which image: give the page to the raters, and keep the key.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import HyperAlignError
from ...files import cannot_write, check_writable, write_text
from ..common.arguments import command_parser, positive
from ..common.progress import progress_bar
from ..common.prompts import abridged
from . import results
from .images import MEGABYTE, Encoding, digest, encode, match, methods_of, prompts_of
from .page import page
from .trials import QUESTIONS, QUESTIONS_WITHOUT_PROMPTS, Key, key_path, plan


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line."""

    folders: list[Path]
    prompts: Path | None
    out: Path
    title: str
    seed: int
    sample: int | None
    against_first: bool
    encoding: Encoding
    max_megabytes: float
    threads: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status. Raises HyperAlignError."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    print(results.run(given[1:]) if given[:1] == ["results"] else build(parse(given)))
    return 0


def build(options: Options) -> str:
    """Writes the page and its key, and returns what was written. Raises HyperAlignError."""
    methods = methods_of(options.folders)
    if named := [method for method in methods if method.casefold() in options.title.casefold().split()]:
        raise HyperAlignError(
            f"The title {options.title!r} contains the method {named[0]!r}, so raters would read it; change "
            "the title."
        )
    images, skipped = match(methods)
    if skipped:
        _inform(f"skipped {len(skipped)} names that are not in every folder: {abridged(skipped)}")
    prompts, why = prompts_of(images, next(iter(methods.values())), options.prompts)
    prompts = _sampled(prompts, options)
    questions = QUESTIONS if all(prompts.values()) else QUESTIONS_WITHOUT_PROMPTS
    if questions is not QUESTIONS:
        _inform(
            f"found no prompts ({why}): the page asks the two questions without one; give prompts with "
            "--prompts"
        )
    for path in (options.out, key_path(options.out)):
        check_writable(path)
    trials = plan(prompts, list(methods), options.seed, options.against_first)
    places = sorted({(one.name, method) for one in trials for method in (one.first, one.second)})
    paths = [images[name][method] for name, method in places]
    study = digest(paths, (f"{one}" for one in trials))
    random.Random(study).shuffle(places)  # so that the images' order in the page does not reveal the methods
    key = Key(study, options.title, options.seed, tuple(methods), tuple(questions), tuple(trials))
    with progress_bar(len(places), "images") as bar:
        ordered = [images[name][method] for name, method in places]
        uris = encode(ordered, options.encoding, options.max_megabytes, options.threads, bar.update)
    _write(key, page(key, questions, uris, {place: index for index, place in enumerate(places)}), options.out)
    size = options.out.stat().st_size / MEGABYTE
    return (
        f"Wrote {options.out} ({size:.1f} MB, {len(places)} images, {len(trials)} pairs) and "
        f"{key_path(options.out)}, which contains the methods: do not show it to the raters."
    )


def _write(key: Key, text: str, path: Path) -> None:
    """Writes the key, then the page: votes of a page without its key could not be counted."""
    for place, content in ((key_path(path), key.to_json()), (path, text)):
        with cannot_write(place, "Free some space, or choose another --out."):
            write_text(place, content)


def _sampled(prompts: dict[str, str], options: Options) -> dict[str, str]:
    """Returns the prompts of --sample names."""
    if options.sample is None or options.sample >= len(prompts):
        return prompts
    names = random.Random(options.seed).sample(list(prompts), options.sample)
    return {name: prompts[name] for name in prompts if name in set(names)}


def _inform(text: str) -> None:
    print(text, file=sys.stderr)


def parse(arguments: Sequence[str]) -> Options:
    """Returns the options of a command line; ends the process on a wrong one."""
    parser = command_parser("study", __doc__)
    add = parser.add_argument
    add("folders", type=Path, nargs="+", metavar="DIR", help="images of one method each; two or more")
    add("--prompts", type=Path, metavar="FILE", help="a .csv or .jsonl of image names and prompts, or a .txt "
        "with a line per name; default: text files beside the images, or their metadata")  # fmt: skip
    add("--out", type=Path, default=Path("study.html"), metavar="FILE",
        help="the page (default: %(default)s)")  # fmt: skip
    add("--title", default="Image study",
        help="heading of the page, without the methods' names (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of sides, order and --sample (default: %(default)s)")
    add("--sample", type=positive, metavar="N", help="number of names to sample by the seed (default: all)")
    add("--against-first", action="store_true",
        help="compare the first DIR with each other one, instead of all pairs")  # fmt: skip
    add("--format", choices=("webp", "jpeg"), default=Encoding().format,
        help="of the images in the page (default: %(default)s)")  # fmt: skip
    add("--quality", type=positive, default=90, help="of the images, 1 to 100 (default: %(default)s)")
    add("--side", type=positive, default=1024,
        help="maximal length of their longer side in pixels (default: %(default)s)")  # fmt: skip
    add("--max-mb", type=float, default=200.0, dest="max_megabytes",
        help="maximal size of the page (default: %(default)s)")  # fmt: skip
    add("--threads", type=positive, default=4, help="threads that encode images (default: %(default)s)")
    found = vars(parser.parse_args(arguments))
    encoding = Encoding(found.pop("format"), min(100, found.pop("quality")), found.pop("side"))
    return Options(encoding=encoding, **found)
