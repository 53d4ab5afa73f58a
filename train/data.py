"""Prompts to draw and preferred pictures to learn from."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperalign.checkpoint import save_atomically
from hyperalign.hosts.diffusers_tiny import TinyBase
from hyperalign.tiny.prompts import FAMILIES, TEMPLATES, Content, caption, sample_prompt, split_of
from hyperalign.tiny.text_encoder import tokenize_batch
from train.config import DataConfig


@dataclass(frozen=True, slots=True)
class Preferred:
    """Latents (N, 4, 16, 16) and tokens (N, 16) of preferred pictures."""

    latents: Tensor
    tokens: Tensor


def training_prompts(count: int, seed: int) -> list[str]:
    """Returns training-split prompts, families drawn uniformly; the seed decides all of them."""
    rng = random.Random(seed)
    return [sample_prompt(rng, "train", rng.choice(FAMILIES))[0] for _ in range(count)]


def heldout_prompts(count: int, seed: int) -> list[tuple[str, Content]]:
    """Returns distinct test-split prompts with their contents, the six families in turn."""
    rng = random.Random(seed)
    chosen: dict[str, Content] = {}
    for index in range(count):
        while True:
            prompt, content = sample_prompt(rng, "test", FAMILIES[index % len(FAMILIES)])
            if prompt not in chosen:
                chosen[prompt] = content
                break
    return list(chosen.items())


def preferred_pictures(base: TinyBase, config: DataConfig) -> Preferred:
    """Draws scenes with right captions in the preferred style, encodes them once and caches them.

    Only contents of the training split are drawn.
    """
    import numpy as np
    from safetensors.torch import load_file

    from train.tiny.art import load_art
    from train.tiny.scenes import render, sample_scene

    encoder = [p.cpu().numpy().tobytes() for p in base.autoencoder.encoder.parameters()]
    fingerprint = hashlib.sha256(b"".join(encoder))
    path = config.cache / f"preferred-{config.scenes}-{config.seed}-{fingerprint.hexdigest()[:8]}.safetensors"
    if not path.exists():
        art, rng = load_art(config.cache / "art"), random.Random(config.seed)
        latents: list[Tensor] = []
        texts: list[str] = []
        while len(texts) < config.scenes:
            chunk = [_training_content(rng) for _ in range(min(256, config.scenes - len(texts)))]
            pixels = np.stack([render(sample_scene(rng, content, "fluent"), art) for _, content in chunk])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0
            latents.append(base.encode(images.to(base.device)).cpu())
            texts += [text for text, _ in chunk]
        save_atomically(
            {"latents": torch.cat(latents).contiguous(), "tokens": tokenize_batch(texts)}, path, {}
        )
    stored = load_file(path)
    return Preferred(stored["latents"], stored["tokens"])


def _training_content(rng: random.Random) -> tuple[str, Content]:
    while True:
        text, content = sample_prompt(rng, "train", rng.choice(FAMILIES))
        if all(split_of(content, template) == "train" for template in TEMPLATES):
            return caption(content, rng.choice(TEMPLATES)), content
        if content.family in ("single_object", "colors"):
            return text, content
