"""What gives images their values: rewards, GenEval, and diversity; each with what identifies its weights."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.files import file_state
from hyperalign.geneval import scorer as geneval
from hyperalign.geneval.prompts import parse_prompt
from hyperalign.rewards import download, loading, tiny
from hyperalign.rewards.text import check_characters
from hyperalign.rewards.weights import WeightFile, find
from hyperalign.tiny.evaluators import load_detector
from hyperalign.tiny.geneval import diversity, is_correct
from hyperalign.tiny.prompts import content_of
from hyperalign.tiny.text_encoder import tokenize_batch
from hyperalign.tiny.weights import part_path
from train.evaluation.image_sets import Metadata
from train.models.image_embedding import Embed, encoder_files, load_encoder

VERSION = 1
"""Raised where values change for the same images and weights: older ones on disk are then not used."""
CORRECT, DIVERSITY = "correct", "diversity"
TINY_PARTS = ("reward", "validation_reward", "detector")

Pixels = Sequence[Tensor]
"""Images (3, H, W) in bytes, which may differ in size."""
Score = Callable[[Sequence[Pixels], Sequence[Metadata]], list[float]]
"""The images and the metadata of several units -> a value of each."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Gives units their values; a unit is one image, or all images of a prompt."""

    name: str
    identity: str
    """Changes with the weights."""
    load: Callable[[torch.device], Score]
    of_prompts: bool = False
    """Whether a unit is all images of a prompt."""
    reads: Callable[[Metadata], object] = lambda line: line["prompt"]
    """The part of the metadata that decides a value."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the weights are."""

    folder: Path
    tokenizer: Path | None = None
    download: bool = False


def reward_scorer(name: str, weights: Weights, prompts: Sequence[str]) -> Scorer:
    """Returns the scorer of a reward, in float32.

    Raises HyperAlignError on an unknown reward, missing weights, or a prompt that it cannot read.
    """
    if name in tiny.NAMES:
        files = [part_path(part) for part in TINY_PARTS]
    else:
        published = loading.published_reward(name)
        download.provide(name, weights.folder, weights.tokenizer, weights.download)
        files = [_original(file, weights.folder) for file in published.files]
    for prompt in dict.fromkeys(prompts):
        check_characters(prompt)
        if name in tiny.NAMES:
            tokenize_batch([prompt])

    def load(device: torch.device) -> Score:
        reward = loading.load(name, weights.folder, device=device, tokenizer_folder=weights.tokenizer)

        def score(units: Sequence[Pixels], lines: Sequence[Metadata]) -> list[float]:
            def of(images_BCHW: Tensor, places: Sequence[int]) -> Tensor:
                return reward.score(images_BCHW, [lines[place]["prompt"] for place in places])

            return _by_size([unit[0] for unit in units], of, device).tolist()

        return score

    return Scorer(name, _identity(name, files), load)


def geneval_scorer(weights: Weights, metadata: Sequence[Metadata]) -> Scorer:
    """Returns the scorer of GenEval's rules: 1 for a correct image, else 0.

    Raises HyperAlignError on missing weights, or metadata without GenEval's requirements.
    """
    for line in metadata:
        parse_prompt(line)
    try:
        files = geneval.provide(weights.folder, weights.tokenizer, weights.download)
    except HyperAlignError as error:
        raise HyperAlignError(
            f"{error} --download fetches it; --geneval none leaves GenEval's columns out."
        ) from error

    def load(device: torch.device) -> Score:
        scorer = geneval.load(weights.folder, device=device, tokenizer_folder=weights.tokenizer)

        def score(units: Sequence[Pixels], lines: Sequence[Metadata]) -> list[float]:
            verdicts = (
                scorer.evaluate(unit[0].float() / 255, parse_prompt(line))[0].correct
                for unit, line in zip(units, lines, strict=True)
            )
            return [float(correct) for correct in verdicts]

        return score

    def reads(line: Metadata) -> object:
        return dict(line)

    return Scorer(CORRECT, _identity("geneval", files), load, reads=reads)


def tiny_geneval_scorer(prompts: Sequence[str]) -> Scorer:
    """Returns the scorer of the tiny model's own GenEval: 1 for a correct image, else 0.

    Raises HyperAlignError on a prompt that is none of its six families.
    """
    for prompt in prompts:
        content_of(prompt)

    def load(device: torch.device) -> Score:
        detector = load_detector().to(device)

        def score(units: Sequence[Pixels], lines: Sequence[Metadata]) -> list[float]:
            def of(images_BCHW: Tensor, places: Sequence[int]) -> Tensor:
                found = detector.detect(tiny.preprocess(images_BCHW))
                contents = [content_of(lines[place]["prompt"]) for place in places]
                return torch.tensor([float(is_correct(*pair)) for pair in zip(contents, found, strict=True)])

            return _by_size([unit[0] for unit in units], of, device).tolist()

        return score

    return Scorer(CORRECT, _identity("tiny geneval", [part_path(part) for part in TINY_PARTS]), load)


def tiny_diversity_scorer() -> Scorer:
    """Returns the scorer of diversity in the embeddings of the tiny validation reward, never optimised."""

    def load(device: torch.device) -> Score:
        return _diversity(tiny.load(tiny.NAMES[1], device=device).embed_images, device)

    files = [part_path(part) for part in TINY_PARTS]
    return Scorer(DIVERSITY, _identity("tiny diversity", files), load, of_prompts=True)


def diversity_scorer(folder: Path) -> Scorer:
    """Returns the scorer of diversity in the embeddings of an image encoder, such as DINOv2.

    Raises HyperAlignError on missing files.
    """

    def load(device: torch.device) -> Score:
        return _diversity(load_encoder(folder, device), device)

    return Scorer(DIVERSITY, _identity("diversity", encoder_files(folder)), load, of_prompts=True)


def _diversity(embed: Embed, device: torch.device) -> Score:
    """Returns the mean cosine distance between a prompt's images, over all pairs of its seeds."""

    def score(units: Sequence[Pixels], lines: Sequence[Metadata]) -> list[float]:
        images = [image for unit in units for image in unit]
        rows_ND = _by_size(images, lambda images_BCHW, _: embed(images_BCHW), device)
        split = rows_ND.split([len(unit) for unit in units])
        return [float(diversity(rows_SD[None])) for rows_SD in split]

    return score


def _by_size(
    images: Pixels, function: Callable[[Tensor, Sequence[int]], Tensor], device: torch.device
) -> Tensor:
    """Returns a function's rows of all images, in their order; images of one size go through it together."""
    sizes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, image_CHW in enumerate(images):
        sizes[tuple(image_CHW.shape)].append(place)
    rows: dict[int, Tensor] = {}
    for places in sizes.values():
        images_BCHW = torch.stack([images[place] for place in places]).to(device).float() / 255
        rows.update(zip(places, function(images_BCHW, places).float().cpu(), strict=True))
    return torch.stack([rows[place] for place in range(len(images))])


def _original(file: WeightFile, folder: Path) -> Path:
    """Returns the published file where it is, since reading it adds a converted one beside it."""
    published = folder / file.path
    return published if published.is_file() else find(file, folder)


def _identity(name: str, files: Sequence[Path]) -> str:
    parts: list[Any] = [VERSION, name, [(path.name, *file_state(path)) for path in files]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
