"""LAION aesthetic v2: a linear head on the unit embedding of OpenAI's ViT-L/14; about 1 to 10."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from . import clip, clip_score
from .heads import HeadNetwork, ScoreHead
from .weights import WeightFile, as_published

ENCODER = replace(clip_score.WEIGHTS, convert=clip.vision_from_transformers)
HEAD = WeightFile(
    "sac+logos+ava1-l14-linearMSE.pth",
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    0.004,
    "head",
    as_published,
)


class AestheticNetwork(HeadNetwork):
    """CLIP's image encoder and the head."""

    def __init__(self, shape: clip.ClipShape) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        self.clip: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape.vision_config()))
        self.head = ScoreHead(shape.embedding)

    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Returns unit embeddings (B, 768)."""
        return clip.embed_images(self.clip, pixels_BCHW)


def network() -> AestheticNetwork:
    """Returns the architecture."""
    return AestheticNetwork(clip.VIT_L_14)
