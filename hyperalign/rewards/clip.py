"""What the CLIP rewards share: the encoders, their weights in two layouts, and their score."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .images import CLIP_MEAN, CLIP_STD, crop_to_square, normalise
from .network_reward import NetworkReward
from .networks import State, at_least_float32, encoder_weight
from .text import CLIP_LENGTH, PromptCache, Tokenizer


@dataclass(frozen=True, slots=True)
class Tower:
    """The sizes of one transformer."""

    width: int
    layers: int
    heads: int

    def config(self) -> dict[str, Any]:
        """The sizes under transformers' names."""
        return {
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }


@dataclass(frozen=True, slots=True)
class ClipShape:
    """The sizes of a CLIP model."""

    vision: Tower
    text: Tower
    embedding: int
    activation: str
    side: int = 224
    patch: int = 14
    vocabulary: int = 49408

    def vision_config(self) -> dict[str, Any]:
        """Arguments of transformers' CLIPVisionConfig."""
        return self.vision.config() | {
            "hidden_act": self.activation,
            "projection_dim": self.embedding,
            "image_size": self.side,
            "patch_size": self.patch,
        }

    def text_config(self) -> dict[str, Any]:
        """Arguments of transformers' CLIPTextConfig."""
        return self.text.config() | {
            "hidden_act": self.activation,
            "projection_dim": self.embedding,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": CLIP_LENGTH,
            # makes transformers pool at the greatest token, the end of text, whatever the padding after it is
            "eos_token_id": 2,
        }


VIT_H_14 = ClipShape(Tower(1280, 32, 16), Tower(1024, 24, 16), 1024, "gelu")
"""laion/CLIP-ViT-H-14-laion2B-s32B-b79K: HPS v2 and PickScore."""

VIT_L_14 = ClipShape(Tower(1024, 24, 16), Tower(768, 12, 12), 768, "quick_gelu")
"""openai/clip-vit-large-patch14: CLIP score and LAION aesthetic."""


class ClipNetwork(nn.Module):
    """Both encoders of a CLIP model. It wraps transformers' module, because a host may set attributes."""

    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        config: Any = CLIPConfig(
            text_config=shape.text_config(),
            vision_config=shape.vision_config(),
            projection_dim=shape.embedding,
        )
        self.clip: Any = CLIPModel(config)

    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Returns unit image embeddings (B, D)."""
        return embed_images(self.clip, pixels_BCHW)

    def embed_texts(self, tokens_BL: Tensor) -> Tensor:
        """Returns unit text embeddings (B, D)."""
        pooled_BC = self.clip.text_model(input_ids=tokens_BL).pooler_output
        return F.normalize(at_least_float32(self.clip.text_projection(pooled_BC)), dim=-1)


def embed_images(clip: Any, pixels_BCHW: Tensor) -> Tensor:
    """Returns unit image embeddings (B, D) of a transformers CLIP model."""
    pooled_BC = clip.vision_model(pixel_values=pixels_BCHW).pooler_output
    return F.normalize(at_least_float32(clip.visual_projection(pooled_BC)), dim=-1)


@dataclass(frozen=True, slots=True)
class ClipReward(NetworkReward[ClipNetwork]):
    """Cosine of an image's and its prompt's embedding, scaled or not."""

    tokenize: Tokenizer
    scaled: bool = False
    """Whether the score is exp(logit_scale) * cosine."""
    _texts: PromptCache = field(default_factory=PromptCache)

    def _score(self, pixels_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        images_BD = self._embed(pixels_BCHW)
        texts_BD = self._texts.features(prompts, self.embed_prompts, images_BD.device)
        cosine_B = (images_BD * texts_BD).sum(dim=-1)
        return self.module.clip.logit_scale.exp() * cosine_B if self.scaled else cosine_B

    def _embed(self, pixels_BCHW: Tensor) -> Tensor:
        return self.module.embed_images(pixels_BCHW)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Returns unit embeddings (B, D) of prompts."""
        return self.module.embed_texts(self.tokenize(prompts).to(encoder_weight(self.module).device))


def preprocess(images_BCHW: Tensor) -> Tensor:
    """Returns the input of CLIP: shortest side to 224, centre crop, CLIP's mean and deviation."""
    return normalise(crop_to_square(images_BCHW, 224), CLIP_MEAN, CLIP_STD)


def from_transformers(state: State) -> State:
    """Returns a transformers CLIPModel's tensors without the position ids that older releases saved."""
    return {key: value for key, value in state.items() if not key.endswith("position_ids")}


def vision_from_transformers(state: State) -> State:
    """Returns the image encoder's tensors of a transformers CLIPModel."""
    others = ("text_model.", "text_projection.", "logit_scale")
    return {key: value for key, value in from_transformers(state).items() if not key.startswith(others)}


_OPEN_CLIP_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)
_OPEN_CLIP_FUSED = re.compile(r"\.attn\.in_proj_(weight|bias)$")
_OPEN_CLIP_TRANSPOSED = ("visual.proj", "text_projection")


def from_open_clip(state: State) -> State:
    """Returns an open_clip model's tensors under transformers' names.

    open_clip fuses the query, key and value projections and writes the last projections as x @ W.
    """
    converted: State = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in _OPEN_CLIP_NAMES:
            name = re.sub(pattern, replacement, name)
        if fused := _OPEN_CLIP_FUSED.search(name):
            for part, rows in zip("qkv", value.tensor_split(3), strict=True):
                converted[f"{name[: fused.start()]}.self_attn.{part}_proj.{fused[1]}"] = rows
        else:
            converted[name] = value.T if key in _OPEN_CLIP_TRANSPOSED else value
    return converted
