"""The evaluators of the tiny model: two reward models, an object detector and a style classifier.

Training maximises `TinyReward`; the other three are for validation only.
Images are (B, 3, 64, 64) in [0, 1]; tokens are those of `text_encoder.tokenize_batch`.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import HyperAlignError
from .geneval import Detection
from .prompts import COLORS, NOUNS, SHAPES
from .text_encoder import CONTEXT_LENGTH, VOCABULARY
from .weights import load_part

Evaluator = TypeVar("Evaluator", bound=nn.Module)

SIDE = 64
GRID = 16
CELL = SIDE // GRID
EMBEDDING = 128
MAX_SCALE = 30.0
RARE_LOG_ODDS = -5.0
"""Initial centre logits of the detector: nearly all of the 7,936 cells of an image hold no centre."""
SAME_OBJECT = 10.0
"""Two peaks closer than this many pixels are one object; objects of a scene are at least 21 apart."""


def _check_images(images_BCHW: Tensor) -> None:
    if images_BCHW.dim() != 4 or tuple(images_BCHW.shape[1:]) != (3, SIDE, SIDE):
        raise HyperAlignError(
            f"A tiny evaluator received images of shape {tuple(images_BCHW.shape)}; expected "
            f"(batch, 3, {SIDE}, {SIDE}) in [0, 1]. Decode with the tiny model's VAE, or resize first."
        )


def _check_pairing(images_BCHW: Tensor, tokens_BL: Tensor) -> None:
    if tokens_BL.dim() != 2 or tokens_BL.shape[0] != images_BCHW.shape[0]:
        raise HyperAlignError(
            f"The tiny reward received {images_BCHW.shape[0]} images and tokens of shape "
            f"{tuple(tokens_BL.shape)}; expected one row of {CONTEXT_LENGTH} tokens per image. "
            "Repeat the prompt for every image."
        )


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns features of the same shape."""
        return x_BCHW + self.body(x_BCHW)


def _down(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)


class _DualEncoder(nn.Module):
    """Score = scale * cosine of an image and a text embedding, as in CLIP and PickScore."""

    feature_channels: int

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def feature_map(self, images_BCHW: Tensor) -> Tensor:
        """Returns spatial features (B, feature_channels, 8, 8) of images in [-1, 1]."""
        raise NotImplementedError

    def pool_map(self, features_BCHW: Tensor) -> Tensor:
        """Returns image embeddings (B, 128), not normalised, of spatial features."""
        raise NotImplementedError

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Returns text embeddings (B, 128), not normalised."""
        raise NotImplementedError

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Returns unit image embeddings (B, 128). Raises HyperAlignError on other shapes."""
        _check_images(images_BCHW)
        return F.normalize(self.pool_map(self.feature_map(images_BCHW * 2.0 - 1.0)).float(), dim=-1)

    def embed_texts(self, tokens_BL: Tensor) -> Tensor:
        """Returns unit text embeddings (B, 128)."""
        return F.normalize(self.encode_text(tokens_BL).float(), dim=-1)

    def scale(self) -> Tensor:
        """Returns the learned factor of the cosine."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def forward(self, images_BCHW: Tensor, tokens_BL: Tensor) -> Tensor:
        """Returns one score per image and prompt (B,).

        Raises:
            HyperAlignError: images are not (B, 3, 64, 64), or the tokens are not one row per image.
        """
        _check_pairing(images_BCHW, tokens_BL)
        cosine_B = (self.embed_images(images_BCHW) * self.embed_texts(tokens_BL)).sum(dim=-1)
        return self.scale() * cosine_B


class TinyReward(_DualEncoder):
    """The preference reward: a smooth convolutional image encoder and a text transformer.

    It is maximised by gradient, hence SiLU, strided convolutions and no max pooling. The last 4x4 map is
    flattened, not averaged: positions and counts of objects must survive.
    """

    feature_channels = 96

    def __init__(self) -> None:
        super().__init__()
        width = self.feature_channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1), nn.GroupNorm(8, 32), nn.SiLU(),
            _down(32, 64), ResidualBlock(64), _down(64, width), ResidualBlock(width),
        )  # fmt: skip
        self.head = nn.Sequential(
            _down(width, width), ResidualBlock(width), nn.GroupNorm(8, width), nn.SiLU(), nn.Flatten(),
            nn.Linear(16 * width, 160), nn.SiLU(), nn.Linear(160, EMBEDDING),
        )  # fmt: skip
        self.token_embedding = nn.Embedding(len(VOCABULARY), width)
        self.position_embedding = nn.Parameter(torch.randn(CONTEXT_LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.text_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, EMBEDDING))

    def feature_map(self, images_BCHW: Tensor) -> Tensor:
        """Returns spatial features (B, 96, 8, 8) of images in [-1, 1]."""
        return self.stem(images_BCHW)

    def pool_map(self, features_BCHW: Tensor) -> Tensor:
        """Returns image embeddings (B, 128) through the flattened 4x4 map."""
        return self.head(features_BCHW)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Returns text embeddings (B, 128), the mean over the 16 tokens."""
        x_BLC = self.token_embedding(tokens_BL) + self.position_embedding
        return self.text_head(self.transformer(x_BLC).mean(dim=1))


class TinyValidationReward(_DualEncoder):
    """The reward that is never optimised: a patch transformer and a bidirectional GRU over the words."""

    feature_channels = 112

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        width = self.feature_channels
        self.patches = nn.Sequential(_down(3, 32), nn.GELU(), _down(32, 64), nn.GELU(), _down(64, width))
        self.patch_position = nn.Parameter(torch.randn(64, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.pool_norm = nn.LayerNorm(width)
        self.head = nn.Sequential(
            nn.Conv2d(width, 24, 1), nn.GELU(), nn.Flatten(),
            nn.Linear(24 * 64, 160), nn.GELU(), nn.Linear(160, EMBEDDING),
        )  # fmt: skip
        self.token_embedding = nn.Embedding(len(VOCABULARY), 64)
        self.gru = nn.GRU(64, 80, batch_first=True, bidirectional=True)
        self.text_head = nn.Linear(160, EMBEDDING)

    def feature_map(self, images_BCHW: Tensor) -> Tensor:
        """Returns spatial features (B, 112, 8, 8) of images in [-1, 1]."""
        x_BLC = self.patches(images_BCHW).flatten(2).transpose(1, 2) + self.patch_position
        x_BLC = self.pool_norm(self.transformer(x_BLC))
        return x_BLC.transpose(1, 2).unflatten(2, (8, 8))

    def pool_map(self, features_BCHW: Tensor) -> Tensor:
        """Returns image embeddings (B, 128) of the narrowed patches, each at its own position."""
        return self.head(features_BCHW)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Returns text embeddings (B, 128), the mean state over the 16 tokens."""
        states_BLC, _ = self.gru(self.token_embedding(tokens_BL))
        return self.text_head(states_BLC.mean(dim=1))


class TinyDetector(nn.Module):
    """Finds objects by their centres (as CenterNet, arXiv 1904.07850) on a 16x16 grid."""

    threshold: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1),
            nn.GroupNorm(8, 32),
            nn.SiLU(),
            _down(32, 64),
            ResidualBlock(64),
        )
        self.context = nn.Sequential(
            _down(64, 96), ResidualBlock(96), ResidualBlock(96), nn.Conv2d(96, 64, 1)
        )
        self.head = nn.Sequential(ResidualBlock(64), nn.GroupNorm(8, 64), nn.SiLU())
        self.centres = nn.Conv2d(64, len(NOUNS), 1)
        self.colors = nn.Conv2d(64, len(COLORS), 1)
        with torch.no_grad():
            self.centres.get_parameter("bias").fill_(RARE_LOG_ODDS)
        self.register_buffer("threshold", torch.tensor(0.4))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits of centres (B, 31 nouns, 16, 16) and of colours (B, 8, 16, 16).

        Raises HyperAlignError when the images are not (B, 3, 64, 64).
        """
        _check_images(images_BCHW)
        near_BCHW = self.stem(images_BCHW * 2.0 - 1.0)
        wide_BCHW = F.interpolate(self.context(near_BCHW), scale_factor=2, mode="nearest")
        features_BCHW = self.head(near_BCHW + wide_BCHW)
        return self.centres(features_BCHW).float(), self.colors(features_BCHW).float()

    @torch.no_grad()
    def detect(self, images_BCHW: Tensor, threshold: float | None = None) -> list[list[Detection]]:
        """Returns the objects of each image by descending score; None uses the tuned threshold."""
        nouns_BNGG, colors_BKGG = self(images_BCHW)
        least = float(self.threshold) if threshold is None else threshold
        return decode_centres(nouns_BNGG.sigmoid().cpu(), colors_BKGG.cpu(), least)


def decode_centres(heat_BNGG: Tensor, colors_BKGG: Tensor, threshold: float) -> list[list[Detection]]:
    """Returns each image's peaks above `threshold`; of peaks within 10 pixels only the highest is kept."""
    best_BGG, noun_BGG = heat_BNGG.max(dim=1)
    color_BGG = colors_BKGG.argmax(dim=1)
    highest_BGG = F.max_pool2d(best_BGG[:, None], 3, stride=1, padding=1)[:, 0]
    is_peak_BGG = (best_BGG == highest_BGG) & (best_BGG >= threshold)
    found: list[list[Detection]] = [[] for _ in range(len(best_BGG))]
    for b, row, column in is_peak_BGG.nonzero().tolist():
        noun = NOUNS[int(noun_BGG[b, row, column])]
        color = COLORS[int(color_BGG[b, row, column])] if noun in SHAPES else None
        x, y = _refine(best_BGG[b], row, column)
        found[b].append(Detection(noun, color, x, y, float(best_BGG[b, row, column])))
    return [_suppress_close(detections) for detections in found]


def _refine(best_GG: Tensor, row: int, column: int) -> tuple[float, float]:
    rows = torch.arange(max(0, row - 1), min(GRID, row + 2))
    columns = torch.arange(max(0, column - 1), min(GRID, column + 2))
    weight = best_GG[rows][:, columns]
    x = float((weight.sum(dim=0) * (columns + 0.5)).sum() / weight.sum())
    y = float((weight.sum(dim=1) * (rows + 0.5)).sum() / weight.sum())
    return x * CELL, y * CELL


def _suppress_close(detections: list[Detection]) -> list[Detection]:
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda d: -d.score):
        if all(math.dist((detection.x, detection.y), (k.x, k.y)) >= SAME_OBJECT for k in kept):
            kept.append(detection)
    return kept


class TinyStyleClassifier(nn.Module):
    """Classifies the style of emoji: Fluent or Noto."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.SiLU(), _down(24, 32), nn.GroupNorm(8, 32), nn.SiLU(),
            _down(32, 64), nn.GroupNorm(8, 64), nn.SiLU(), _down(64, 64), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1),
        )  # fmt: skip

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Returns the log odds of Fluent (B,). Raises HyperAlignError on other shapes."""
        _check_images(images_BCHW)
        return self.body(images_BCHW * 2.0 - 1.0)[:, 0].float()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Returns the probability of Fluent (B,). Raises HyperAlignError on other shapes."""
        return self.logits(images_BCHW).sigmoid()


def _load_weights(module: Evaluator, name: str) -> Evaluator:
    tensors, _ = load_part(name)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise HyperAlignError(
            f"The weights of the tiny evaluator {name!r} do not fit this version of the code ({error}). "
            "Use the weights of the same version, or rebuild them with train/tiny/build.py."
        ) from error
    return module.eval().requires_grad_(False)


def load_reward() -> TinyReward:
    """Returns the trained reward, frozen; raises HyperAlignError if its weights are missing or wrong."""
    return _load_weights(TinyReward(), "reward")


def load_validation_reward() -> TinyValidationReward:
    """Returns the trained validation reward, frozen; raises HyperAlignError as `load_reward`."""
    return _load_weights(TinyValidationReward(), "validation_reward")


def load_detector() -> TinyDetector:
    """Returns the trained detector, frozen; raises HyperAlignError as `load_reward`."""
    return _load_weights(TinyDetector(), "detector")


def load_style_classifier() -> TinyStyleClassifier:
    """Returns the trained style classifier, frozen; raises HyperAlignError as `load_reward`."""
    return _load_weights(TinyStyleClassifier(), "style")
