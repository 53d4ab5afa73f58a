"""Trains the embedded world's judges: reward, detector, validation reward and style classifier."""

from __future__ import annotations

import random
from collections.abc import Callable
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
from hyperalign.tiny.prompts import COLORS, NOUNS, Content, Split, sample_content
from hyperalign.tiny.text_encoder import tokenize_batch
from hyperalign.tiny.weights import save_part
from train.tiny.art import Art
from train.tiny.attributes import ATTRIBUTES, image_binding, prompt_binding
from train.tiny.augment import jitter
from train.tiny.evaluator_metrics import (
    Figures,
    detector_figures,
    reward_figures,
    style_figures,
    tune_threshold,
)
from train.tiny.fitting import Fit, Workshop, run_fit
from train.tiny.pairs import (
    GROUP_IMAGES,
    GROUP_TEXTS,
    NO_COLOR,
    PairBatch,
    centre_targets,
    draw,
    sample_clutter,
    sample_pairs,
    sample_right,
)
from train.tiny.scenes import Scene, sample_scene

Reconstruct = Callable[[Tensor], Tensor]
"""Images (B, 3, 64, 64) in [0, 1] -> the autoencoder's version of them."""

GROUPS = 16
BATCH = GROUPS * GROUP_IMAGES
RECONSTRUCTED = 16
"""Images of every second batch that pass through the autoencoder (whole groups, the first ones)."""
TASTE = 0.9
"""How often the liked image should win against its right but worse twin: a margin of 2.2."""
CLUTTER = 0.3
READOUT_GAIN = 16.0
"""Unit embeddings enter the attribute read-out at this length, so that small weights can separate them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPlan:
    """Where a reward's pairs come from."""

    seed: int
    split: Split | None
    same_layout: float


REWARD_FIT = Fit(name="reward", steps=1200, lr=1.5e-3, ema=0.99)
REWARD_PLAN = PairPlan(seed=101, split="train", same_layout=0.7)
VALIDATION_FIT = Fit(name="validation_reward", steps=1200, lr=1.2e-3, ema=0.99)
VALIDATION_PLAN = PairPlan(seed=202, split=None, same_layout=0.3)
DETECTOR_FIT = Fit(name="detector", steps=1100, lr=2e-3, ema=0.99)
READING_FIT = Fit(name="text", steps=1200, lr=1.5e-3)
STYLE_FIT = Fit(name="style", steps=250, lr=2e-3)


class SpottedReward(nn.Module):
    """A reward with two helper heads that form its features quickly: what lies where, what is bound."""

    def __init__(self, reward: TinyReward | TinyValidationReward) -> None:
        super().__init__()
        self.reward = reward
        self.spotter = nn.Conv2d(reward.feature_channels, len(NOUNS) + len(COLORS), 1)
        self.attributes = nn.Linear(EMBEDDING, ATTRIBUTES)
        nn.init.constant_(self.spotter.get_parameter("bias"), RARE_LOG_ODDS)
        nn.init.constant_(self.attributes.get_parameter("bias"), RARE_LOG_ODDS)

    def read(self, prompts: list[tuple[Content, str]]) -> dict[str, Tensor]:
        """Returns the loss of the prompts' read-out alone."""
        texts_TD = self.reward.embed_texts(tokenize_batch([text for _, text in prompts]))
        return {"prompts": prompt_binding(self.attributes(texts_TD * READOUT_GAIN), [c for c, _ in prompts])}

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        """Returns the named losses of a batch."""
        reward = self.reward
        features = reward.feature_map(batch.images_NCHW * 2.0 - 1.0)
        images_ND = F.normalize(reward.pool_map(features).float(), dim=-1)
        texts_TD = reward.embed_texts(batch.tokens_TL)
        scores_NT = (reward.scale() * images_ND @ texts_TD.T).float()
        spots = spotting(self.spotter(features).float(), batch.scenes)
        seen = image_binding(self.attributes(images_ND * READOUT_GAIN), batch.scenes)
        read = prompt_binding(self.attributes(texts_TD * READOUT_GAIN), batch.prompts())
        return {
            "contrast": contrast(scores_NT, batch),
            "taste": taste(scores_NT),
            "images": 0.3 * seen,
            "prompts": 0.3 * read,
            "centres": 0.3 * spots["centres"],
            "colors": 0.3 * spots["colors"],
        }


def contrast(scores_NT: Tensor, batch: PairBatch) -> Tensor:
    """Every right combination against the wrong ones of its row and column (InfoNCE, both ways).

    -log(e^s / (e^s + sum of wrong e^s')) = softplus(logsumexp(wrong) - s).
    """
    wrong_NT = scores_NT.masked_fill(~batch.wrong_NT, -1e4)
    n, t = batch.own_NT.nonzero(as_tuple=True)
    right = scores_NT[n, t]
    by_image = F.softplus(wrong_NT.logsumexp(dim=1)[n] - right)
    by_prompt = F.softplus(wrong_NT.logsumexp(dim=0)[t] - right)
    return 0.5 * (by_image + by_prompt).mean()


def taste(scores_NT: Tensor) -> Tensor:
    """Bradley-Terry between the liked image and its worse twin, with `TASTE` as the odds."""
    rows = torch.arange(0, len(scores_NT), GROUP_IMAGES)
    columns = torch.arange(0, scores_NT.shape[1], GROUP_TEXTS)
    margin = scores_NT[rows, columns] - scores_NT[rows + 1, columns]
    return F.binary_cross_entropy_with_logits(margin, torch.full_like(margin, TASTE))


def spotting(logits_NKGG: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
    """CenterNet's penalty-reduced focal loss for nouns, cross-entropy for the colours of shapes."""
    heat, colors = centre_targets(scenes, logits_NKGG.shape[-1])
    nouns_logits, color_logits = logits_NKGG.split((len(NOUNS), len(COLORS)), dim=1)
    chance = nouns_logits.sigmoid()
    at_centre = heat == 1.0
    hits = (1.0 - chance).square() * F.logsigmoid(nouns_logits) * at_centre
    others = (1.0 - heat).pow(4) * chance.square() * F.logsigmoid(-nouns_logits) * ~at_centre
    focal = -(hits + others).sum() / at_centre.sum()
    return {"centres": focal, "colors": F.cross_entropy(color_logits, colors, ignore_index=NO_COLOR)}


def _blurred(images: Tensor, step: int, reconstruct: Reconstruct, bend: float = 0.0) -> Tensor:
    if step % 2:
        with torch.no_grad():
            images = torch.cat([reconstruct(images[:RECONSTRUCTED]).clamp(0.0, 1.0), images[RECONSTRUCTED:]])
    return jitter(images, torch.Generator().manual_seed(step), bend)


def train_reward(
    reward: TinyReward | TinyValidationReward,
    fit: Fit,
    plan: PairPlan,
    shop: Workshop,
    art: Art,
    reconstruct: Reconstruct,
) -> TinyReward | TinyValidationReward:
    """Trains either reward and returns its averaged weights.

    Its text encoder learns to read first, which is cheap; then both encoders learn from pairs.
    """
    model = SpottedReward(reward)

    def reading_losses_of(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{plan.seed}-text-{step}")
        return model.read([sample_right(rng, plan.split) for _ in range(BATCH)])

    run_fit(replace(READING_FIT, name=f"{fit.name}_text"), model, reading_losses_of, shop)

    def losses_of(step: int) -> dict[str, Tensor]:
        pairs = sample_pairs(random.Random(f"{plan.seed}-{step}"), GROUPS, art, plan.split, plan.same_layout)
        images = _blurred(pairs.images_NCHW, step, reconstruct)
        batch = PairBatch(images, pairs.tokens_TL, pairs.own_NT, pairs.wrong_NT, pairs.scenes)
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    trained = run_fit(fit, model, losses_of, shop)
    return trained.reward


def _mixed_scenes(rng: random.Random, count: int) -> list[Scene]:
    contents = [sample_clutter(rng) if rng.random() < CLUTTER else sample_content(rng) for _ in range(count)]
    return [sample_scene(rng, content) for content in contents]


def train_detector(shop: Workshop, art: Art, reconstruct: Reconstruct) -> TinyDetector:
    """Trains the detector on scenes of the grammar and on cluttered ones."""
    model = TinyDetector()

    def losses_of(step: int) -> dict[str, Tensor]:
        scenes = _mixed_scenes(random.Random(f"303-{step}"), BATCH)
        images = _blurred(draw(scenes, art), step, reconstruct, bend=1.5)
        with torch.autocast("cpu", torch.bfloat16):
            nouns, colors = model(images)
        return spotting(torch.cat([nouns, colors], dim=1), scenes)

    trained = run_fit(DETECTOR_FIT, model, losses_of, shop)
    trained.threshold.fill_(tune_threshold(trained, art))
    return trained


def train_style(shop: Workshop, art: Art, reconstruct: Reconstruct) -> TinyStyleClassifier:
    """Trains the style classifier."""
    model = TinyStyleClassifier()

    def losses_of(step: int) -> dict[str, Tensor]:
        scenes = _mixed_scenes(random.Random(f"404-{step}"), BATCH)
        images = _blurred(draw(scenes, art), step, reconstruct, bend=1.0)
        labels = torch.tensor([float(scene.style == "fluent") for scene in scenes])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.logits(images)
        return {"style": F.binary_cross_entropy_with_logits(logits, labels)}

    return run_fit(STYLE_FIT, model, losses_of, shop)


def train_judges(shop: Workshop, art: Art, reconstruct: Reconstruct) -> None:
    """Trains the four judges, measures each on validation scenes and saves it, the reward first."""

    def finish(name: str, module: nn.Module, fit: Fit, metrics: Figures) -> None:
        header = {
            "training": asdict(fit),
            "data": "EmojiScenes, drawn anew at every step",
            "metrics": metrics,
        }
        save_part(name, module.state_dict(), shop.header(header), shop.weights)

    torch.manual_seed(1)
    reward = train_reward(TinyReward(), REWARD_FIT, REWARD_PLAN, shop, art, reconstruct)
    finish("reward", reward, REWARD_FIT, reward_figures(reward, art))

    torch.manual_seed(3)
    detector = train_detector(shop, art, reconstruct)
    finish("detector", detector, DETECTOR_FIT, detector_figures(detector, art))

    torch.manual_seed(2)
    validation = train_reward(TinyValidationReward(), VALIDATION_FIT, VALIDATION_PLAN, shop, art, reconstruct)
    finish("validation_reward", validation, VALIDATION_FIT, reward_figures(validation, art))

    torch.manual_seed(4)
    style = train_style(shop, art, reconstruct)
    finish("style", style, STYLE_FIT, style_figures(style, art))
