"""Metrics of the evaluators on scenes and prompts that they were not trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperalign.tiny.evaluators import TinyDetector, TinyReward, TinyStyleClassifier, TinyValidationReward
from hyperalign.tiny.geneval import is_correct
from hyperalign.tiny.prompts import FAMILIES, Content, Split, near_miss, sample_prompt
from hyperalign.tiny.text_encoder import tokenize_batch
from train.tiny.art import Art
from train.tiny.augment import degrade, jitter
from train.tiny.pairs import render_all, sample_captioned, sample_near_miss
from train.tiny.scenes import Scene, sample_scene

Metrics = dict[str, float | dict[str, float]]
IMAGES = 600
PER_FAMILY = 100
TUNING_PER_FAMILY = 30
THRESHOLDS = tuple(0.1 * i for i in range(1, 9))


def _share(wins: Tensor) -> float:
    return round(float(wins.float().mean()), 4)


@torch.no_grad()
def reward_metrics(
    reward: TinyReward | TinyValidationReward, art: Art, split: Split | None = None
) -> Metrics:
    """Returns the share of jittered validation pairs that a reward orders correctly, and mean margins."""
    rng = random.Random(9001)
    generator = torch.Generator().manual_seed(9001)
    rights = [sample_captioned(rng, split) for _ in range(IMAGES)]
    misses = [sample_near_miss(rng, right, None) for right in rights]
    preferred = [sample_scene(rng, right.content, "fluent") for right in rights]
    clean = render_all(preferred, art)
    right_tokens = tokenize_batch([right.text for right in rights])
    miss_tokens = tokenize_batch([missed.text for missed in misses])

    def score(images: Tensor, tokens: Tensor) -> Tensor:
        return reward(jitter(images, generator), tokens)

    best = score(clean, right_tokens)
    other_style = score(render_all([replace(scene, style="noto") for scene in preferred], art), right_tokens)
    wrong_image = score(
        render_all([sample_scene(rng, missed.content, "fluent") for missed in misses], art), right_tokens
    )
    wrong_prompt = score(clean, miss_tokens)
    degraded = score(degrade(clean, generator), right_tokens)
    families = [right.words.family for right in rights]
    return {
        "right_image_wins": _share(best > wrong_image),
        "right_prompt_wins": _share(best > wrong_prompt),
        "noto_right_beats_fluent_wrong": _share(other_style > wrong_image),
        "fluent_wins": _share(best > other_style),
        "clean_wins": _share(best > degraded),
        "margin_content": round(float((best - wrong_image).mean()), 3),
        "margin_style": round(float((best - other_style).mean()), 3),
        "margin_clean": round(float((best - degraded).mean()), 3),
        "by_family": _by_family(families, best > wrong_image),
    }


def _by_family(families: Sequence[str], wins: Tensor) -> dict[str, float]:
    rows = {family: [i for i, other in enumerate(families) if other == family] for family in FAMILIES}
    return {family: _share(wins[indices]) for family, indices in rows.items() if indices}


def _evaluation_scenes(seed: int, per_family: int) -> tuple[list[Content], list[Scene], list[Scene]]:
    rng = random.Random(seed)
    contents = [sample_prompt(rng, "test", family)[1] for family in FAMILIES for _ in range(per_family)]
    right = [sample_scene(rng, content) for content in contents]
    wrong = [sample_scene(rng, near_miss(content, rng)) for content in contents]
    return contents, right, wrong


@dataclass(frozen=True, slots=True)
class _Examples:
    """Prompts, with jittered images of right scenes and of near misses."""

    contents: list[Content]
    right: Tensor
    wrong: Tensor


def _examples(art: Art, seed: int, per_family: int, bend: float) -> _Examples:
    contents, right, wrong = _evaluation_scenes(seed, per_family)
    images = [
        jitter(render_all(scenes, art), torch.Generator().manual_seed(seed), bend)
        for scenes in (right, wrong)
    ]
    return _Examples(contents, *images)


def _detector_results(detector: TinyDetector, examples: _Examples, threshold: float) -> tuple[Tensor, Tensor]:
    """Returns for each prompt whether the right image is accepted, and whether the near miss is refused."""

    def accepted(images: Tensor) -> Tensor:
        found = detector.detect(images, threshold)
        return torch.tensor([is_correct(c, d) for c, d in zip(examples.contents, found, strict=True)])

    return accepted(examples.right), ~accepted(examples.wrong)


def tune_threshold(detector: TinyDetector, art: Art) -> float:
    """Returns the threshold with the most correct results on warped scenes that serve only this.

    Of equally good ones it is the middle, the furthest from both kinds of error.
    """
    examples = _examples(art, 9002, TUNING_PER_FAMILY, bend=1.5)
    results = [torch.cat(_detector_results(detector, examples, t)) for t in THRESHOLDS]
    correct = [result.sum().item() for result in results]
    best = [t for t, count in zip(THRESHOLDS, correct, strict=True) if count == max(correct)]
    return best[len(best) // 2]


def detector_metrics(detector: TinyDetector, art: Art) -> Metrics:
    """Returns the share of correct results on jittered true scenes and near misses, per family."""
    threshold = float(detector.threshold)
    accepted, refused = _detector_results(detector, _examples(art, 9003, PER_FAMILY, 1.0), threshold)
    families = [family for family in FAMILIES for _ in range(PER_FAMILY)]
    return {
        "threshold": round(threshold, 3),
        "true_accepted": _share(accepted),
        "near_miss_refused": _share(refused),
        "true_accepted_by_family": _by_family(families, accepted),
        "near_miss_refused_by_family": _by_family(families, refused),
    }


@torch.no_grad()
def style_metrics(classifier: TinyStyleClassifier, art: Art) -> Metrics:
    """Returns the share of jittered validation scenes whose style is classified correctly."""
    _, scenes, _ = _evaluation_scenes(9004, IMAGES // len(FAMILIES))
    chance = classifier(jitter(render_all(scenes, art), torch.Generator().manual_seed(9004), bend=1.0))
    return {"accuracy": _share((chance > 0.5) == torch.tensor([scene.style == "fluent" for scene in scenes]))}
