"""PickScore v1 (arXiv 2305.01569): ViT-H-14 tuned on Pick-a-Pic; about 17 to 24."""

from __future__ import annotations

from . import clip
from .clip import ClipNetwork, ClipReward, from_transformers
from .text import Tokenizer
from .weights import WeightFile

WEIGHTS = WeightFile(
    "PickScore_v1/model.safetensors",
    "https://huggingface.co/yuvalkirstain/PickScore_v1/resolve/main/model.safetensors",
    3.9,
    "clip",
    from_transformers,
)


def network() -> ClipNetwork:
    """Returns the architecture."""
    return ClipNetwork(clip.VIT_H_14)


def reward(name: str, module: ClipNetwork, tokenize: Tokenizer) -> ClipReward:
    """Returns the reward: exp(logit_scale) times the cosine."""
    return ClipReward(name, module, clip.preprocess, tokenize, scaled=True)
