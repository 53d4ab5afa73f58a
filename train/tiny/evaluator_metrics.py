"""How good the judges are on scenes and prompts they were not trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hyperalign.tiny.evaluators import TinyDetector, TinyReward, TinyStyleClassifier, TinyValidationReward
from hyperalign.tiny.geneval import is_correct
from hyperalign.tiny.prompts import FAMILIES, Content, Split, near_miss, sample_prompt
from hyperalign.tiny.text_encoder import tokenize_batch
from train.tiny.art import Art
from train.tiny.augment import degrade, jitter
from train.tiny.pairs import draw, sample_miss, sample_right
from train.tiny.scenes import Scene, sample_scene

Figures = dict[str, float | dict[str, float]]
PER_FAMILY = 100
THRESHOLDS = tuple(0.1 * i for i in range(1, 9))


def _share(wins: Tensor) -> float:
    return round(float(wins.float().mean()), 4)


@torch.no_grad()
def reward_figures(
    reward: TinyReward | TinyValidationReward, art: Art, split: Split | None = None, count: int = 600
) -> Figures:
    """Share of validation pairs that the reward orders rightly, and the mean margins, on jittered images."""
    rng = random.Random(9001)
    generator = torch.Generator().manual_seed(9001)
    rights = [sample_right(rng, split) for _ in range(count)]
    misses = [sample_miss(rng, content, None) for content, _ in rights]
    liked = [sample_scene(rng, content, "fluent") for content, _ in rights]
    clean = draw(liked, art)
    right_tokens, miss_tokens = (tokenize_batch([text for _, text in pairs]) for pairs in (rights, misses))

    def score(images: Tensor, tokens: Tensor) -> Tensor:
        return reward(jitter(images, generator), tokens)

    best = score(clean, right_tokens)
    other_style = score(draw([replace(scene, style="noto") for scene in liked], art), right_tokens)
    wrong_image = score(
        draw([sample_scene(rng, missed, "fluent") for missed, _ in misses], art), right_tokens
    )
    wrong_prompt = score(clean, miss_tokens)
    damaged = score(degrade(clean, generator), right_tokens)
    families = [content.family for content, _ in rights]
    return {
        "right_image_wins": _share(best > wrong_image),
        "right_prompt_wins": _share(best > wrong_prompt),
        "noto_right_beats_fluent_wrong": _share(other_style > wrong_image),
        "fluent_wins": _share(best > other_style),
        "clean_wins": _share(best > damaged),
        "margin_content": round(float((best - wrong_image).mean()), 3),
        "margin_style": round(float((best - other_style).mean()), 3),
        "margin_clean": round(float((best - damaged).mean()), 3),
        "by_family": _by_family(families, best > wrong_image),
    }


def _by_family(families: Sequence[str], wins: Tensor) -> dict[str, float]:
    rows = {family: [i for i, other in enumerate(families) if other == family] for family in FAMILIES}
    return {family: _share(wins[indices]) for family, indices in rows.items() if indices}


def _judged_scenes(seed: int, per_family: int) -> tuple[list[Content], list[Scene], list[Scene]]:
    rng = random.Random(seed)
    contents = [sample_prompt(rng, "test", family)[1] for family in FAMILIES for _ in range(per_family)]
    right = [sample_scene(rng, content) for content in contents]
    wrong = [sample_scene(rng, near_miss(content, rng)) for content in contents]
    return contents, right, wrong


def _verdicts(
    detector: TinyDetector, art: Art, seed: int, per_family: int, threshold: float, bend: float
) -> tuple[Tensor, Tensor]:
    contents, right, wrong = _judged_scenes(seed, per_family)

    def judge(scenes: list[Scene]) -> Tensor:
        images = jitter(draw(scenes, art), torch.Generator().manual_seed(seed), bend)
        found = detector.detect(images, threshold)
        return torch.tensor([is_correct(c, d) for c, d in zip(contents, found, strict=True)])

    return judge(right), ~judge(wrong)


def tune_threshold(detector: TinyDetector, art: Art) -> float:
    """Returns the threshold with the most right verdicts on bent scenes kept for this alone.

    Of equally good ones the middle: the furthest from both kinds of error.
    """
    right = [torch.cat(_verdicts(detector, art, 9002, 30, t, bend=1.5)).sum().item() for t in THRESHOLDS]
    best = [t for t, count in zip(THRESHOLDS, right, strict=True) if count == max(right)]
    return best[len(best) // 2]


def detector_figures(detector: TinyDetector, art: Art) -> Figures:
    """Share of right verdicts on true scenes and on near misses, per family, on jittered images."""
    accepted, refused = _verdicts(detector, art, 9003, PER_FAMILY, float(detector.threshold), bend=1.0)
    families = [family for family in FAMILIES for _ in range(PER_FAMILY)]
    return {
        "threshold": round(float(detector.threshold), 3),
        "true_accepted": _share(accepted),
        "near_miss_refused": _share(refused),
        "true_accepted_by_family": _by_family(families, accepted),
        "near_miss_refused_by_family": _by_family(families, refused),
    }


@torch.no_grad()
def style_figures(classifier: TinyStyleClassifier, art: Art, count: int = 600) -> Figures:
    """Share of validation jittered scenes whose style is told rightly."""
    _, scenes, _ = _judged_scenes(9004, count // len(FAMILIES))
    chance = classifier(jitter(draw(scenes, art), torch.Generator().manual_seed(9004), bend=1.0))
    return {"accuracy": _share((chance > 0.5) == torch.tensor([scene.style == "fluent" for scene in scenes]))}
