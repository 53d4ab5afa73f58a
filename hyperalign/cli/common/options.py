"""Options of reward models and of scoring a folder, which several commands share."""

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
from .arguments import DTYPES, command_parser, positive


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """Adds --weights, --download, --tokenizer and --device."""
    add = parser.add_argument
    add("--weights", type=Path, default=Path("models/hyperalign_rewards"), metavar="FOLDER",
        help="folder of the reward models' weights (default: %(default)s)")  # fmt: skip
    add("--download", action="store_true", help="download missing weights into it first")
    add("--tokenizer", type=Path, metavar="FOLDER",
        help="folder of the tokenizer's vocabulary (default: that of the weights)")  # fmt: skip
    add("--device", help="of the networks (default: the GPU if there is one)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOptions:
    """The images, the reward models, and how to compute."""

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
        """Loads the reward models. Raises HyperAlignError."""
        dtype = DTYPES[self.dtype]
        return [
            loading.load(name, self.weights, device=device, dtype=dtype, tokenizer_folder=self.tokenizer)
            for name in self.rewards
        ]

    def check_rewards(self) -> None:
        """Raises HyperAlignError on an unknown reward, or on one that is given twice."""
        if len(set(self.rewards)) != len(self.rewards):
            raise HyperAlignError(f"Found the rewards {', '.join(self.rewards)}; give each of them once.")
        for name in self.published:
            loading.published_reward(name)

    def provide_files(self) -> None:
        """Downloads the rewards' missing files if asked to. Raises HyperAlignError if some stay missing."""
        for name in self.published:
            download.provide(name, self.weights, self.tokenizer, self.download)

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """Raises HyperAlignError on a prompt with half a character, or with words unknown to a reward."""
        for prompt in dict.fromkeys(prompts):
            check_characters(prompt)
            if len(self.published) < len(self.rewards):
                word_ids(prompt)

    @property
    def published(self) -> list[str]:
        """The rewards that have weight files; those of the tiny model have none."""
        return [name for name in self.rewards if name not in tiny.NAMES]


def scoring_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Returns a parser of all `ScoringOptions`."""
    parser = command_parser(command, description)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of images; its subfolders are included")
    add("--reward", action="append", required=True, dest="rewards", metavar="NAME",
        help=f"one of {', '.join(loading.NAMES)}; repeat it for several")  # fmt: skip
    add_weights_options(parser)
    add("--dtype", choices=list(DTYPES), default="float32", help="of the networks (default: %(default)s)")
    add("--batch", type=positive, default=16, help="maximal batch size (default: %(default)s)")
    add("--threads", type=positive, default=4, help="threads that decode images (default: %(default)s)")
    return parser
