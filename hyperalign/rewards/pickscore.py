"""PickScore v1 (arXiv 2305.01569): ViT-H-14 tuned on Pick-a-Pic; exp(logit_scale) cosine, about 17 to 24."""

from __future__ import annotations

from . import clip
from .clip import ClipNetwork, from_transformers
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
