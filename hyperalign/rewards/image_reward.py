"""ImageReward v1.0 (arXiv 2304.05977): BLIP tuned on human preferences; about -2 to 2."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .clip import Tower
from .heads import ScoreHead
from .network_reward import NetworkReward
from .networks import State, at_least_float32
from .text import Tokenizer, bert_attention_mask
from .weights import WeightFile

MEAN = 0.16717362830052426
STD = 1.0333394966054072
"""Of the raw score over the authors' data; the published score is standardised."""


@dataclass(frozen=True, slots=True)
class BlipShape:
    """The sizes of both encoders."""

    vision: Tower = Tower(1024, 24, 16)  # noqa: RUF009 - Tower is frozen
    text: Tower = Tower(768, 12, 12)  # noqa: RUF009
    side: int = 224
    patch: int = 16
    vocabulary: int = 30524
    """bert-base-uncased with [DEC] and [ENC]."""


BLIP_LARGE = BlipShape()


class ImageRewardNetwork(nn.Module):
    """BLIP's image encoder, a BERT that attends to it, and a head on the [CLS] token."""

    def __init__(self, shape: BlipShape) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        vision = BlipVisionConfig(
            **shape.vision.config(),
            image_size=shape.side,
            patch_size=shape.patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            **shape.text.config(),
            encoder_hidden_size=shape.vision.width,
            vocab_size=shape.vocabulary,
            max_position_embeddings=512,
            is_decoder=True,  # makes transformers add cross-attention
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        self.head = ScoreHead(shape.text.width)

    def encode_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Returns the image's tokens (B, 197, 1024), [CLS] first."""
        return self.vision(pixel_values=pixels_BCHW).last_hidden_state

    def score(self, image_BNC: Tensor, tokens_BL: Tensor) -> Tensor:
        """Returns standardised scores (B,) of image tokens and prompt tokens."""
        hidden_BLC = self.text(
            input_ids=tokens_BL,
            attention_mask=bert_attention_mask(tokens_BL),
            encoder_hidden_states=image_BNC,
            is_decoder=False,
        ).last_hidden_state
        return (self.head(hidden_BLC[:, 0]) - MEAN) / STD


@dataclass(frozen=True, slots=True)
class ImageReward(NetworkReward[ImageRewardNetwork]):
    """The score of an image encoded together with its prompt; embeddings are the image's [CLS] tokens."""

    tokenize: Tokenizer

    def _score(self, pixels_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        image_BNC = self.module.encode_images(pixels_BCHW)
        return self.module.score(image_BNC, self.tokenize(prompts).to(image_BNC.device))

    def _embed(self, pixels_BCHW: Tensor) -> Tensor:
        return F.normalize(at_least_float32(self.module.encode_images(pixels_BCHW)[:, 0]), dim=-1)


def network() -> ImageRewardNetwork:
    """Returns the architecture."""
    return ImageRewardNetwork(BLIP_LARGE)


_NAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\.encoder\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"^(vision\.encoder\.layers\.\d+)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\.encoder\.layers\.\d+)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""BLIP's contrastive projections, which the score does not use, and position ids."""


def from_official(state: State) -> State:
    """Returns the tensors of ImageReward.pt under transformers' names."""
    converted: State = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if not key.startswith(_UNUSED):
            converted[name] = value
    return converted


WEIGHTS = WeightFile(
    "ImageReward.pt",
    "https://huggingface.co/THUDM/ImageReward/resolve/main/ImageReward.pt",
    1.8,
    "",
    from_official,
)
