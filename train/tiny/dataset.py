"""EmojiScenes for the trainer: prompts and encoded preference images."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyperalign.checkpoint import save_atomically
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.tiny import TinyBase
from hyperalign.tiny.prompts import (
    FAMILIES,
    PALETTES,
    WORDINGS,
    Content,
    Family,
    caption,
    content_of,
    meant,
    near_miss,
    sample_content,
    sample_prompt,
    split_of,
)
from hyperalign.tiny.text_encoder import text_of, tokenize_batch
from train.config import DataConfig

if TYPE_CHECKING:
    from train.tiny.art import Style

MAX_TRIES = 500
"""A prompt that these many samples do not contain does not exist."""
CHUNK = 256
"""Scenes that are rendered and encoded at once."""


@dataclass(frozen=True, slots=True)
class PreferenceLatents:
    """Latents (N, 4, 16, 16) and captions of preference images."""

    latents: Tensor
    captions: list[str]


def training_prompts(
    count: int, seed: int, families: Sequence[Family] = FAMILIES, wordings: Sequence[str] = WORDINGS
) -> list[str]:
    """Returns training-split prompts, families sampled uniformly; the seed decides all of them."""
    rng = random.Random(seed)
    return [sample_prompt(rng, "train", rng.choice(families), wordings)[0] for _ in range(count)]


def validation_prompts(
    count: int, seed: int, wordings: Sequence[str] = WORDINGS
) -> list[tuple[str, Content]]:
    """Returns distinct test-split prompts with what they ask for, the six families in turn.

    The two small families hold about 25 such prompts each; further prompts come from the other families.

    Raises:
        HyperAlignError: there are not that many.
    """
    rng = random.Random(seed)
    chosen: dict[str, Content] = {}
    families = list(FAMILIES)
    while len(chosen) < count and families:
        for family in tuple(families):
            new = next((p for p in _samples(rng, family, wordings) if p[0] not in chosen), None)
            if new is None:
                families.remove(family)
            elif len(chosen) < count:
                chosen[new[0]] = new[1]
    if len(chosen) < count:
        raise HyperAlignError(f"There are {len(chosen)} validation prompts, not {count}. Ask for fewer.")
    return list(chosen.items())


def _samples(rng: random.Random, family: Family, wordings: Sequence[str]) -> Iterator[tuple[str, Content]]:
    """Yields MAX_TRIES random test prompts of a family."""
    for _ in range(MAX_TRIES):
        yield sample_prompt(rng, "test", family, wordings)


def preference_latents(base: TinyBase, config: DataConfig) -> PreferenceLatents:
    """Samples scenes with right captions in the preferred style, encodes them once and caches them.

    Their contents are of the training split.
    """
    from safetensors.torch import load_file

    path = _cache_path(base, config, "preferred")
    if not path.exists():
        rng = random.Random(config.seed)
        latents: list[Tensor] = []
        texts: list[str] = []
        encode = SceneEncoder(base, config.cache, rng)
        while len(texts) < config.scenes:
            chunk = [_training_content(rng, config) for _ in range(min(CHUNK, config.scenes - len(texts)))]
            latents.append(encode([(content, "fluent") for _, content in chunk]))
            texts += [text for text, _ in chunk]
        save_atomically(
            {"latents": torch.cat(latents).contiguous(), "tokens": tokenize_batch(texts)}, path, {}
        )
    stored = load_file(path)
    return PreferenceLatents(stored["latents"], [text_of(row) for row in stored["tokens"].tolist()])


def rejected_latents(base: TinyBase, config: DataConfig, captions: Sequence[str]) -> Tensor:
    """Returns latents (N, 4, 16, 16) of a rejected image for each caption of the preferred ones, cached.

    Half of them show something else in the preferred style, half what is asked for in the other style.
    """
    from safetensors.torch import load_file

    path = _cache_path(base, config, "rejected")
    if not path.exists():
        rng = random.Random(config.seed + 1)
        encode = SceneEncoder(base, config.cache, rng)
        looks = [_rejected(content_of(caption), rng) for caption in captions]
        latents = [encode(looks[first : first + CHUNK]) for first in range(0, len(looks), CHUNK)]
        save_atomically({"latents": torch.cat(latents).contiguous()}, path, {})
    return load_file(path)["latents"]


def _rejected(content: Content, rng: random.Random) -> tuple[Content, Style]:
    return (near_miss(content, rng), "fluent") if rng.random() < 0.5 else (content, "noto")


class SceneEncoder:
    """Samples a scene of each content in a style, renders and encodes it."""

    def __init__(self, base: TinyBase, cache: Path, rng: random.Random) -> None:
        from train.tiny.art import load_art

        self.base, self.art, self.rng = base, load_art(cache / "art"), rng

    def __call__(self, looks: Sequence[tuple[Content, Style]]) -> Tensor:
        """Returns latents (N, 4, 16, 16)."""
        import numpy as np

        from train.tiny.scenes import render, sample_scene

        scenes = [sample_scene(self.rng, content, style) for content, style in looks]
        pixels = np.stack([render(scene, self.art) for scene in scenes])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0
        return self.base.encode(images.to(self.base.device)).cpu()


def _cache_path(base: TinyBase, config: DataConfig, name: str) -> Path:
    """Returns where the latents of these settings are kept."""
    fingerprint = hashlib.sha256(repr((PALETTES, config.families, config.wordings)).encode())
    for parameter in base.autoencoder.encoder.parameters():
        fingerprint.update(parameter.cpu().numpy().tobytes())
    return config.cache / f"{name}-{config.scenes}-{config.seed}-{fingerprint.hexdigest()[:8]}.safetensors"


def _training_content(rng: random.Random, config: DataConfig) -> tuple[str, Content]:
    """Returns a caption of the training split and what its image shows."""
    while True:
        words, template = sample_content(rng, rng.choice(config.families)), rng.choice(config.wordings)
        if split_of(words, template) == "train":
            return caption(words, template), meant(words, template)
