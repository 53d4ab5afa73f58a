"""The tiny model's validation prompts, sampled and scored: the metrics in training and in the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperalign.checkpoint import HyperAlign
from hyperalign.tiny.evaluators import (
    load_detector,
    load_reward,
    load_style_classifier,
    load_validation_reward,
)
from hyperalign.tiny.geneval import diversity, is_correct, summarise
from hyperalign.tiny.prompts import WORDINGS, Content, Family
from hyperalign.tiny.text_encoder import tokenize_batch
from train.analysis.conditioning import Judge, Strata
from train.evaluation.table import Numbers
from train.models.tiny import Tiny
from train.sampling import SampledImages, sample
from train.tiny.dataset import validation_prompts

PROMPT_SEED = 2601


@dataclass(frozen=True, slots=True)
class Samples(SampledImages):
    """Images of P validation prompts at S seeds, with what they should show."""

    contents: list[Content]


@dataclass(frozen=True, slots=True)
class Scores:
    """The metrics of every image, (P, S); diversity is per prompt, (P,)."""

    reward: Tensor
    validation_reward: Tensor
    correct: Tensor
    style: Tensor
    diversity: Tensor


def sample_all(
    base: Tiny,
    hyperalign: HyperAlign | None,
    count: int,
    *,
    seeds: tuple[int, ...],
    steps: int,
    guidance_scale: float,
    strength: float = 1.0,
    bf16: bool = False,
    wordings: Sequence[str] = WORDINGS,
) -> Samples:
    """Samples `count` validation prompts at every seed; `hyperalign` None samples the base model."""
    chosen = validation_prompts(count, PROMPT_SEED, wordings)
    images = sample(
        base, base, hyperalign, [prompt for prompt, _ in chosen],
        seeds=seeds, steps=steps, guidance_scale=guidance_scale, strength=strength, bf16=bf16,
    )  # fmt: skip
    return _showing(images, [content for _, content in chosen])


def _showing(images: SampledImages, contents: list[Content]) -> Samples:
    return Samples(
        images.prompts,
        images.images,
        images.seconds_per_image,
        images.generations_per_run,
        images.finite,
        contents,
    )


@torch.no_grad()
def score(samples: Samples) -> Scores:
    """Scores every image with the reward and with the evaluators that were never optimised."""
    shape = samples.images.shape[:2]
    flat = samples.images.flatten(0, 1)
    tokens = tokenize_batch(samples.prompts).repeat_interleave(shape[1], dim=0)
    validation = load_validation_reward().eval()
    detections = load_detector().eval().detect(flat)
    contents = [content for content in samples.contents for _ in range(shape[1])]
    correct = [is_correct(content, found) for content, found in zip(contents, detections, strict=True)]
    return Scores(
        reward=load_reward().eval()(flat, tokens).view(shape),
        validation_reward=validation(flat, tokens).view(shape),
        correct=torch.tensor(correct).view(shape),
        style=load_style_classifier().eval()(flat).view(shape),
        diversity=diversity(validation.embed_images(flat).view(*shape, -1))
        if shape[1] > 1
        else torch.zeros(shape[0]),
    )


def judged(contents: Sequence[Content]) -> tuple[Judge, Strata]:
    """Returns what scores images of these contents by the figures that no training optimised.

    GenEval is the mean over its families, as `metrics` has it.
    """

    def judge(images: SampledImages) -> dict[str, Numbers]:
        scores = score(_showing(images, [*contents]))
        values = {"geneval": scores.correct.float(), "validation_reward": scores.validation_reward}
        return {name: found_PS.double().mean(dim=1).numpy() for name, found_PS in values.items()}

    families = [content.family for content in contents]
    groups = [
        [n for n, other in enumerate(families) if other == family] for family in dict.fromkeys(families)
    ]
    return judge, {"geneval": groups}


def means_and_spread(scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the mean of each reward's scores over the images and, as `spread`, their standard deviation."""
    spread = {name: float(values.std(correction=0)) for name, values in scores.items()}
    return {name: float(values.mean()) for name, values in scores.items()} | {"spread": spread}


def metrics(samples: Samples) -> dict[str, Any]:
    """Returns the mean of every metric, as the log contains them; the diversity where there are two seeds."""
    scores = score(samples)
    marks: list[tuple[Family, bool]] = [
        (content.family, bool(correct))
        for content, row in zip(samples.contents, scores.correct.tolist(), strict=True)
        for correct in row
    ]
    rewards = {"reward": scores.reward, "validation_reward": scores.validation_reward}
    several = samples.images.shape[1] > 1
    return means_and_spread(rewards) | {
        "geneval": summarise(marks),
        "style": float(scores.style.mean()),
        **({"diversity": float(scores.diversity.mean())} if several else {}),
        "seconds_per_image": samples.seconds_per_image,
        "generations_per_run": samples.generations_per_run,
        "not_finite": samples.not_finite,
    }
