"""Trains the evaluators of the tiny model: reward, detector, validation reward and style classifier."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperalign.tiny.evaluators import (
    EMBEDDING,
    RARE_LOG_ODDS,
    TinyDetector,
    TinyReward,
    TinyStyleClassifier,
    TinyValidationReward,
)
from hyperalign.tiny.prompts import COLORS, NOUNS, Split, sample_content
from hyperalign.tiny.text_encoder import tokenize_batch
from hyperalign.tiny.weights import save_part
from train.tiny.art import Art
from train.tiny.attributes import ATTRIBUTES, image_attribute_loss, prompt_attribute_loss
from train.tiny.augment import jitter
from train.tiny.evaluator_metrics import (
    Metrics,
    detector_metrics,
    reward_metrics,
    style_metrics,
    tune_threshold,
)
from train.tiny.fitting import BuildSettings, Fit, run_fit
from train.tiny.pairs import (
    GROUP_IMAGES,
    GROUP_TEXTS,
    NO_COLOR,
    Captioned,
    PairBatch,
    centre_targets,
    render_all,
    sample_captioned,
    sample_clutter,
    sample_pairs,
)
from train.tiny.scenes import Scene, sample_scene

Reconstruct = Callable[[Tensor], Tensor]
"""Images (B, 3, 64, 64) in [0, 1] -> their reconstructions by the autoencoder."""

GROUPS = 16
BATCH = GROUPS * GROUP_IMAGES
RECONSTRUCTED = 16
"""Images of every second batch that pass through the autoencoder (whole groups, the first ones)."""
WIN_RATE = 0.9
"""Target share of pairs in which the preferred image beats the rejected one: a margin of 2.2."""
CLUTTER = 0.3
"""Share of cluttered scenes in the batches of detector and style classifier."""
ATTRIBUTE_GAIN = 16.0
"""Unit embeddings enter the attribute head at this length, so that small weights can separate them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings:
    """How the preference pairs of a reward are sampled."""

    seed: int
    split: Split | None
    same_layout: float


REWARD_FIT = Fit(name="reward", steps=2400, lr=1.5e-3, ema=0.99)
REWARD_PAIRS = PairSettings(seed=101, split="train", same_layout=0.7)
VALIDATION_FIT = Fit(name="validation_reward", steps=2400, lr=1.2e-3, ema=0.99)
VALIDATION_PAIRS = PairSettings(seed=202, split=None, same_layout=0.3)
DETECTOR_FIT = Fit(name="detector", steps=1100, lr=2e-3, ema=0.99)
TEXT_FIT = Fit(name="text", steps=1200, lr=1.5e-3)
STYLE_FIT = Fit(name="style", steps=250, lr=2e-3)


class RewardTraining(nn.Module):
    """A reward model with two auxiliary heads that speed up its training: object detection and attributes."""

    def __init__(self, reward: TinyReward | TinyValidationReward) -> None:
        super().__init__()
        self.reward = reward
        self.detection = nn.Conv2d(reward.feature_channels, len(NOUNS) + len(COLORS), 1)
        self.attributes = nn.Linear(EMBEDDING, ATTRIBUTES)
        nn.init.constant_(self.detection.get_parameter("bias"), RARE_LOG_ODDS)
        nn.init.constant_(self.attributes.get_parameter("bias"), RARE_LOG_ODDS)

    def prompt_loss(self, prompts: Sequence[Captioned]) -> dict[str, Tensor]:
        """Returns the attribute loss of prompts alone."""
        texts_TD = self.reward.embed_texts(tokenize_batch([prompt.text for prompt in prompts]))
        logits_TK = self.attributes(texts_TD * ATTRIBUTE_GAIN)
        return {"prompts": prompt_attribute_loss(logits_TK, [prompt.content for prompt in prompts])}

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        """Returns the named losses of a batch."""
        reward = self.reward
        features = reward.feature_map(batch.images_NCHW * 2.0 - 1.0)
        images_ND = F.normalize(reward.pool_map(features).float(), dim=-1)
        texts_TD = reward.embed_texts(batch.tokens_TL)
        scores_NT = (reward.scale() * images_ND @ texts_TD.T).float()
        objects = detection_loss(self.detection(features).float(), batch.scenes)
        images = image_attribute_loss(self.attributes(images_ND * ATTRIBUTE_GAIN), batch.scenes)
        prompts = prompt_attribute_loss(self.attributes(texts_TD * ATTRIBUTE_GAIN), batch.prompts())
        return {
            "contrast": contrastive_loss(scores_NT, batch),
            "preference": preference_loss(scores_NT),
            "images": 0.3 * images,
            "prompts": 0.3 * prompts,
            "centres": 0.3 * objects["centres"],
            "colors": 0.3 * objects["colors"],
        }


def contrastive_loss(scores_NT: Tensor, batch: PairBatch) -> Tensor:
    """InfoNCE in both directions: each positive against the negatives of its row and of its column.

    -log(e^s / (e^s + sum of negative e^s')) = softplus(logsumexp(negative) - s).
    """
    negative_NT = scores_NT.masked_fill(~batch.negative_NT, -1e4)
    n, t = batch.positive_NT.nonzero(as_tuple=True)
    positive = scores_NT[n, t]
    by_image = F.softplus(negative_NT.logsumexp(dim=1)[n] - positive)
    by_prompt = F.softplus(negative_NT.logsumexp(dim=0)[t] - positive)
    return 0.5 * (by_image + by_prompt).mean()


def preference_loss(scores_NT: Tensor) -> Tensor:
    """Bradley-Terry between the preferred and the rejected image, with `WIN_RATE` as the target."""
    rows = torch.arange(0, len(scores_NT), GROUP_IMAGES)
    columns = torch.arange(0, scores_NT.shape[1], GROUP_TEXTS)
    margin = scores_NT[rows, columns] - scores_NT[rows + 1, columns]
    return F.binary_cross_entropy_with_logits(margin, torch.full_like(margin, WIN_RATE))


def detection_loss(logits_NKGG: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
    """CenterNet's penalty-reduced focal loss for nouns, cross-entropy for the colours of shapes."""
    heat, colors = centre_targets(scenes, logits_NKGG.shape[-1])
    nouns_logits, color_logits = logits_NKGG.split((len(NOUNS), len(COLORS)), dim=1)
    chance = nouns_logits.sigmoid()
    at_centre = heat == 1.0
    hits = (1.0 - chance).square() * F.logsigmoid(nouns_logits) * at_centre
    others = (1.0 - heat).pow(4) * chance.square() * F.logsigmoid(-nouns_logits) * ~at_centre
    focal = -(hits + others).sum() / at_centre.sum()
    return {"centres": focal, "colors": F.cross_entropy(color_logits, colors, ignore_index=NO_COLOR)}


def _augmented(images: Tensor, step: int, reconstruct: Reconstruct, bend: float = 0.0) -> Tensor:
    if step % 2:
        with torch.no_grad():
            images = torch.cat([reconstruct(images[:RECONSTRUCTED]).clamp(0.0, 1.0), images[RECONSTRUCTED:]])
    return jitter(images, torch.Generator().manual_seed(step), bend)


def train_reward(
    reward: TinyReward | TinyValidationReward,
    fit: Fit,
    pairs: PairSettings,
    settings: BuildSettings,
    art: Art,
    reconstruct: Reconstruct,
) -> TinyReward | TinyValidationReward:
    """Trains either reward and returns its averaged weights.

    The text encoder trains on attributes first, which is cheap; then both encoders train on pairs.
    """
    model = RewardTraining(reward)

    def text_losses_of(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{pairs.seed}-text-{step}")
        return model.prompt_loss([sample_captioned(rng, pairs.split) for _ in range(BATCH)])

    run_fit(replace(TEXT_FIT, name=f"{fit.name}_text"), model, text_losses_of, settings)

    def losses_of(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{pairs.seed}-{step}")
        batch = sample_pairs(rng, GROUPS, art, pairs.split, pairs.same_layout)
        batch = replace(batch, images_NCHW=_augmented(batch.images_NCHW, step, reconstruct))
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    trained = run_fit(fit, model, losses_of, settings)
    return trained.reward


def _mixed_scenes(rng: random.Random, count: int) -> list[Scene]:
    contents = [sample_clutter(rng) if rng.random() < CLUTTER else sample_content(rng) for _ in range(count)]
    return [sample_scene(rng, content) for content in contents]


def train_detector(settings: BuildSettings, art: Art, reconstruct: Reconstruct) -> TinyDetector:
    """Trains the detector on scenes of the grammar and on cluttered scenes."""
    model = TinyDetector()

    def losses_of(step: int) -> dict[str, Tensor]:
        scenes = _mixed_scenes(random.Random(f"303-{step}"), BATCH)
        images = _augmented(render_all(scenes, art), step, reconstruct, bend=1.5)
        with torch.autocast("cpu", torch.bfloat16):
            nouns, colors = model(images)
        return detection_loss(torch.cat([nouns, colors], dim=1), scenes)

    trained = run_fit(DETECTOR_FIT, model, losses_of, settings)
    trained.threshold.fill_(tune_threshold(trained, art))
    return trained


def train_style(settings: BuildSettings, art: Art, reconstruct: Reconstruct) -> TinyStyleClassifier:
    """Trains the style classifier."""
    model = TinyStyleClassifier()

    def losses_of(step: int) -> dict[str, Tensor]:
        scenes = _mixed_scenes(random.Random(f"404-{step}"), BATCH)
        images = _augmented(render_all(scenes, art), step, reconstruct, bend=1.0)
        labels = torch.tensor([float(scene.style == "fluent") for scene in scenes])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.logits(images)
        return {"style": F.binary_cross_entropy_with_logits(logits, labels)}

    return run_fit(STYLE_FIT, model, losses_of, settings)


def _save(name: str, module: nn.Module, fit: Fit, metrics: Metrics, settings: BuildSettings) -> None:
    header = {"training": asdict(fit), "data": "EmojiScenes, sampled anew at every step", "metrics": metrics}
    save_part(name, module.state_dict(), settings.header(header), settings.weights)


def build_reward(settings: BuildSettings, art: Art, reconstruct: Reconstruct) -> None:
    """Trains the reward, measures it on validation scenes and saves it."""
    torch.manual_seed(1)
    reward = train_reward(TinyReward(), REWARD_FIT, REWARD_PAIRS, settings, art, reconstruct)
    _save("reward", reward, REWARD_FIT, reward_metrics(reward, art), settings)


def build_validation_reward(settings: BuildSettings, art: Art, reconstruct: Reconstruct) -> None:
    """Trains the reward that is never optimised, measures it on validation scenes and saves it."""
    torch.manual_seed(2)
    validation = TinyValidationReward()
    validation = train_reward(validation, VALIDATION_FIT, VALIDATION_PAIRS, settings, art, reconstruct)
    _save("validation_reward", validation, VALIDATION_FIT, reward_metrics(validation, art), settings)


def build_detectors(settings: BuildSettings, art: Art, reconstruct: Reconstruct) -> None:
    """Trains the object detector and the style classifier, measures and saves them."""
    torch.manual_seed(3)
    detector = train_detector(settings, art, reconstruct)
    _save("detector", detector, DETECTOR_FIT, detector_metrics(detector, art), settings)
    torch.manual_seed(4)
    style = train_style(settings, art, reconstruct)
    _save("style", style, STYLE_FIT, style_metrics(style, art), settings)
