"""Every reward by its name, with its published weights or with random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import HyperAlignError
from . import (
    Reward,
    aesthetic,
    clip,
    clip_score,
    heads,
    hpsv2,
    image_reward,
    pickscore,
    siglip_aesthetic,
    text,
    tiny,
)
from .images import Preprocess
from .networks import fill, random_state
from .text import Tokenizer, Vocabulary
from .weights import WeightFile, find, load_state


@dataclass(frozen=True, slots=True)
class PublishedReward:
    """The parts of a reward whose weights are published."""

    files: tuple[WeightFile, ...]
    network: Callable[[], nn.Module]
    preprocess: Preprocess
    reward: Callable[..., Reward]
    """Makes it of its name, the network, `preprocess` and, if there is a vocabulary, the tokenizer."""
    vocabulary: Vocabulary | None = None

    def assemble(self, name: str, network: nn.Module, tokenizer: Tokenizer | None) -> Reward:
        """Returns the reward of a network with weights."""
        return self.reward(name, network, self.preprocess, *([] if tokenizer is None else [tokenizer]))


PUBLISHED = {
    "hpsv2.1": PublishedReward(
        (hpsv2.V2_1,), hpsv2.network, hpsv2.preprocess, clip.ClipReward, text.OPEN_CLIP
    ),
    "hpsv2": PublishedReward(
        (hpsv2.V2_0,), hpsv2.network, hpsv2.preprocess, clip.ClipReward, text.OPEN_CLIP
    ),
    "pickscore": PublishedReward(
        (pickscore.WEIGHTS,), pickscore.network, clip.preprocess,
        partial(clip.ClipReward, scaled=True), text.CLIP,
    ),
    "imagereward": PublishedReward(
        (image_reward.WEIGHTS,), image_reward.network, clip.preprocess,
        image_reward.ImageReward, text.BERT,
    ),
    "clip": PublishedReward(
        (clip_score.WEIGHTS,), clip_score.network, clip.preprocess, clip.ClipReward, text.CLIP
    ),
    "aesthetic": PublishedReward(
        (aesthetic.ENCODER, aesthetic.HEAD), aesthetic.network, clip.preprocess, heads.HeadReward
    ),
    "siglip-aesthetic": PublishedReward(
        (siglip_aesthetic.ENCODER, siglip_aesthetic.HEAD), siglip_aesthetic.network,
        siglip_aesthetic.preprocess, heads.HeadReward,
    ),
}  # fmt: skip
NAMES = (*tiny.NAMES, *PUBLISHED)


def load(
    name: str,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer_folder: Path | None = None,
) -> Reward:
    """Loads one of `NAMES`, frozen. Nothing is downloaded.

    Args:
        name: one of `NAMES`.
        folder: of the weight files, with their published names; the tiny rewards need none.
        device: of the network.
        dtype: of the encoders; score heads stay float32.
        tokenizer_folder: of the vocabulary, if not `folder/tokenizer` or `folder`. CLIP's is `vocab.json`
            and `merges.txt` (ComfyUI has it in `comfy/sd1_tokenizer`), BERT's `vocab.txt`.

    Raises:
        HyperAlignError: another name; a file is missing, damaged, of another model, or contains code.
    """
    if name in tiny.NAMES:
        return tiny.load(name, device=device, dtype=dtype)
    published = published_reward(name)
    files = {find(file, folder): file for file in published.files}
    vocabulary = published.vocabulary
    tokenizer = None if vocabulary is None else vocabulary.load(folder, tokenizer_folder)
    # A host may run in inference mode; weights made there can never be part of a gradient.
    with torch.inference_mode(False):
        network = _on_meta(published)
        fill(network, load_state(network, files, torch.device(device), dtype))
    return published.assemble(name, network, tokenizer)


def random_weights(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    tokenizer_folder: Path | None = None,
    seed: int = 0,
) -> Reward:
    """Returns a reward of the true architecture with random weights, for smoke runs and benchmarks.

    Without a `tokenizer_folder` the tokens are checksums of words. The tiny rewards keep their own
    weights. Raises HyperAlignError on another name or damaged tokenizer files.
    """
    if name in tiny.NAMES:
        return tiny.load(name, device=device, dtype=dtype)
    published = published_reward(name)
    tokenizer: Any = None
    if (vocabulary := published.vocabulary) is not None:
        tokenizer = vocabulary.hash_tokenizer
        if tokenizer_folder is not None:
            tokenizer = vocabulary.load(tokenizer_folder)
    with torch.inference_mode(False):
        network = _on_meta(published)
        fill(network, random_state(network, torch.device(device), dtype, seed))
    return published.assemble(name, network, tokenizer)


def check_files(name: str, folder: Path, tokenizer_folder: Path | None = None) -> list[Path]:
    """Returns the weight files of one of `PUBLISHED`, without reading them; arguments as for `load`.

    Raises HyperAlignError: another name, a file is missing, or the vocabulary is missing or damaged.
    """
    published = published_reward(name)
    paths = [find(file, folder) for file in published.files]
    if published.vocabulary is not None:
        published.vocabulary.load(folder, tokenizer_folder)
    return paths


def published_reward(name: str) -> PublishedReward:
    """Returns the parts of a reward. Raises HyperAlignError on a name that is not in `PUBLISHED`."""
    if name not in PUBLISHED:
        raise HyperAlignError(f"There is no reward {name!r}; expected one of {', '.join(NAMES)}.")
    return PUBLISHED[name]


def _on_meta(published: PublishedReward) -> nn.Module:
    """Returns the network on the meta device: initialising 986 M weights would take a minute."""
    with torch.device("meta"):
        return published.network()
