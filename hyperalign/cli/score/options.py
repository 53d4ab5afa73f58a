"""What the commands that score a folder have in common: their options, and the rewards they name."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import HyperAlignError
from ...rewards import Reward, download, loading, tiny
from ...rewards.text import check_characters
from ...tiny.text_encoder import word_ids

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STOPPED = 130
"""The exit status of what Ctrl+C ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOptions:
    """Which images, which rewards, and how to compute."""

    folder: Path
    rewards: list[str]
    weights: Path
    tokenizer: Path | None
    device: str | None
    dtype: str
    batch: int
    threads: int
    download: bool

    def load(self, device: torch.device) -> list[Reward]:
        """Loads the rewards. Raises HyperAlignError."""
        dtype = DTYPES[self.dtype]
        return [
            loading.load(name, self.weights, device=device, dtype=dtype, tokenizer_folder=self.tokenizer)
            for name in self.rewards
        ]

    def check_rewards(self) -> None:
        """Raises HyperAlignError unless the rewards are known, and named once each."""
        if len(set(self.rewards)) != len(self.rewards):
            raise HyperAlignError(f"Found the rewards {', '.join(self.rewards)}; give each of them once.")
        for name in self.published:
            loading.published_reward(name)

    def provide_files(self) -> None:
        """Fetches the rewards' files that are missing, if asked to; reads none that is large.

        Raises HyperAlignError unless all are there then.
        """
        for name in self.published:
            if self.download:
                download.download(name, self.weights)
            loading.check_files(name, self.weights, self.tokenizer)

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """Raises HyperAlignError where a prompt has half a character or words unknown to a reward."""
        for prompt in dict.fromkeys(prompts):
            check_characters(prompt)
            if len(self.published) < len(self.rewards):
                word_ids(prompt)

    @property
    def published(self) -> list[str]:
        """The rewards that have files; the tiny ones have none."""
        return [name for name in self.rewards if name not in tiny.NAMES]


def scoring_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Returns a parser of all `ScoringOptions`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of images; those in its folders count too")
    add("--reward", action="append", required=True, dest="rewards", metavar="NAME",
        help=f"one of {', '.join(loading.NAMES)}; give it again for several")  # fmt: skip
    add("--weights", type=Path, default=Path("models/hyperalign_rewards"), metavar="FOLDER",
        help="where the rewards' weights lie (default: %(default)s)")  # fmt: skip
    add("--download", action="store_true", help="fetch what is missing of them first")
    add("--tokenizer", type=Path, metavar="FOLDER", help="where the vocabulary lies, if not with the weights")
    add("--device", help="default: the GPU where there is one")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the networks (default: %(default)s)")
    add("--batch", type=positive, default=16, help="images at once, at most (default: %(default)s)")
    add("--threads", type=positive, default=4, help="that decode images (default: %(default)s)")
    return parser


def positive(text: str) -> int:
    """Returns a whole number of 1 or more. Raises ArgumentTypeError and ValueError."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected 1 or more")
    return number
