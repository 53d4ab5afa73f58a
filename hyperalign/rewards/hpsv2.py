"""HPS v2.0 and v2.1 (arXiv 2306.09341): ViT-H-14 tuned on human preferences; the cosine, about 0.2 to 0.4."""

from __future__ import annotations

from torch import Tensor

from . import clip
from .clip import ClipNetwork, from_open_clip
from .images import CLIP_MEAN, CLIP_STD, normalise, pad_to_square
from .weights import WeightFile

HUB = "https://huggingface.co/xswu/HPSv2/resolve/main"
V2_0 = WeightFile("HPS_v2_compressed.pt", f"{HUB}/HPS_v2_compressed.pt", 2.0, "clip", from_open_clip)
V2_1 = WeightFile("HPS_v2.1_compressed.pt", f"{HUB}/HPS_v2.1_compressed.pt", 2.0, "clip", from_open_clip)


def network() -> ClipNetwork:
    """Returns the architecture."""
    return ClipNetwork(clip.VIT_H_14)


def preprocess(images_BCHW: Tensor) -> Tensor:
    """Returns the input of HPS: longest side to 224, padded with black, CLIP's mean and deviation."""
    return normalise(pad_to_square(images_BCHW, 224), CLIP_MEAN, CLIP_STD)
