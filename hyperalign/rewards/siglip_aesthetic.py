"""Aesthetic predictor v2.5: a linear head on SigLIP so400m-patch14-384; about 1 to 10, 5.5 is good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .heads import HeadNetwork, ScoreHead
from .images import normalise, stretch_to_square
from .networks import State, at_least_float32
from .weights import WeightFile

SIDE = 384
HALF = (0.5, 0.5, 0.5)
HEAD_INDICES = (0, 2, 4, 6, 8)


@dataclass(frozen=True, slots=True)
class SiglipShape:
    """The sizes of a SigLIP image encoder."""

    width: int = 1152
    intermediate: int = 4304
    layers: int = 27
    heads: int = 16
    side: int = SIDE
    patch: int = 14


SO400M = SiglipShape()


class SiglipNetwork(HeadNetwork):
    """SigLIP's image encoder and the head."""

    def __init__(self, shape: SiglipShape) -> None:
        super().__init__()
        from transformers import SiglipConfig, SiglipModel

        vision = {
            "hidden_size": shape.width,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "image_size": shape.side,
            "patch_size": shape.patch,
        }
        # Unlike SiglipVisionModel, this part of SiglipModel has the same names in every release.
        text = {"num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 1}
        config: Any = SiglipConfig(vision_config=vision, text_config=text)
        self.vision_model: Any = SiglipModel(config).vision_model
        self.head = ScoreHead(shape.width, HEAD_INDICES)

    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Returns unit embeddings (B, 1152)."""
        pooled_BD = self.vision_model(pixel_values=pixels_BCHW).pooler_output
        return F.normalize(at_least_float32(pooled_BD), dim=-1)


def network() -> SiglipNetwork:
    """Returns the architecture."""
    return SiglipNetwork(SO400M)


def preprocess(images_BCHW: Tensor) -> Tensor:
    """Returns the input of SigLIP: 384 x 384 for images of any shape, in [-1, 1]."""
    return normalise(stretch_to_square(images_BCHW, SIDE), HALF, HALF)


def vision_from_transformers(state: State) -> State:
    """Returns the image encoder's tensors of a transformers SiglipModel."""
    others = ("text_model.", "logit_scale", "logit_bias")
    return {
        key.removeprefix("vision_model."): value
        for key, value in state.items()
        if not key.startswith(others) and not key.endswith("position_ids")
    }


def head_as_published(state: State) -> State:
    """Returns the head's tensors under our names."""
    return {key.replace("scoring_head.", "layers."): value for key, value in state.items()}


ENCODER = WeightFile(
    "siglip-so400m-patch14-384/model.safetensors",
    "https://huggingface.co/google/siglip-so400m-patch14-384/resolve/main/model.safetensors",
    3.5,
    "vision_model",
    vision_from_transformers,
)
HEAD = WeightFile(
    "aesthetic_predictor_v2_5.pth",
    "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth",
    0.003,
    "head",
    head_as_published,
)
