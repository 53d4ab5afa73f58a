"""Makes the prompt lists of training and of the paper's four tests from the published files.

python train/prompt_sets.py --published data/published --out data

writes prompts.txt and validation.txt, which the recipes name, and test_pickapic.txt (1,000), test_hpd.txt
(500), test_parti.txt (1,000) and test_geneval.jsonl (553). It says how to download a file that is missing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    # `python train/prompt_sets.py` puts train/ on sys.path, where train.py hides the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro

from hyperalign.errors import HyperAlignError
from train.data.prompt_sets import find_published, make_prompt_sets, write_prompt_sets


@dataclass(frozen=True, slots=True)
class Options:
    """Where the published files are, and which lists to make."""

    published: Path = Path("data/published")
    """Folder of the downloaded files: pickapic/, hpdv2/, parti/, geneval/."""
    out: Path = Path("data")
    """Folder for the lists."""
    train: int = 20000
    """Prompts of the training list, from Pick-a-Pic's training split."""
    validation: int = 500
    """Prompts of the validation list, from the same split."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        for name in ("train", "validation"):
            if getattr(options, name) < 1:
                raise HyperAlignError(f"--{name} is {getattr(options, name)}; expected 1 or more prompts.")
        files = find_published(options.published)
        sets = make_prompt_sets(files, options.train, options.validation)
        paths = write_prompt_sets(sets, options.out)
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, path in paths.items():
        counts = sets.report[name]
        left_out = ", ".join(
            f"{counts[key]} {key}" for key in ("read", "duplicates", "in other lists") if key in counts
        )
        print(f"{path}: {counts['written']} prompts" + (f" ({left_out})" if left_out else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
