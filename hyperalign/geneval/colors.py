"""The colour of an object: the nearest of ten to CLIP, with everything else in grey."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rewards.clip import ClipReward
from ..rewards.networks import without_autocast
from .detector import SegmentedObject
from .prompts import COLORS

BACKGROUND = 0x99 / 255
"""The official #999."""
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


class ColorClassifier:
    """Zero-shot colours by CLIP ViT-L/14.

    Args:
        clip: the CLIP score's reward.
    """

    def __init__(self, clip: ClipReward) -> None:
        self._clip = clip
        self._text_embeddings = lru_cache(maxsize=None)(self._encode)

    def colors(self, image_CHW: Tensor, objects: list[SegmentedObject]) -> list[str]:
        """Returns the colour of each object of an image (3, H, W) in [0, 1]."""
        return [self._color(cutout(image_CHW, item), item.name) for item in objects]

    def _color(self, crop_CHW: Tensor, name: str) -> str:
        with torch.no_grad():
            embedding_BD = self._clip.embed_images(crop_CHW[None])
            cosines_K = self._text_embeddings(name).to(embedding_BD) @ embedding_BD[0]
        return COLORS[int(cosines_K.argmax())]

    def _encode(self, name: str) -> Tensor:
        """Returns unit vectors (10, D), one per colour: the mean over the templates."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        with torch.no_grad(), without_autocast(self._clip.module):
            embeddings_KTD = self._clip.embed_prompts(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
        return F.normalize(embeddings_KTD.mean(dim=1), dim=-1)


def cutout(image_CHW: Tensor, found: SegmentedObject) -> Tensor:
    """Returns the box of an object from an image, with grey outside its mask."""
    left, top, right, bottom = (int(edge) for edge in found.box)
    crop_CHW = image_CHW[:, top:bottom, left:right]
    if found.mask_HW is None:
        return crop_CHW
    mask_HW = found.mask_HW[top:bottom, left:right].to(image_CHW.device)
    return torch.where(mask_HW, crop_CHW, torch.full_like(crop_CHW, BACKGROUND))
