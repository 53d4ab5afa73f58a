"""CLIP score (arXiv 2104.08718): the cosine of OpenAI's ViT-L/14, about 0.1 to 0.35."""

from __future__ import annotations

from . import clip
from .clip import ClipNetwork, from_transformers
from .weights import WeightFile

WEIGHTS = WeightFile(
    "clip-vit-large-patch14/model.safetensors",
    "https://huggingface.co/openai/clip-vit-large-patch14/resolve/main/model.safetensors",
    1.7,
    "clip",
    from_transformers,
)


def network() -> ClipNetwork:
    """Returns the architecture."""
    return ClipNetwork(clip.VIT_L_14)
