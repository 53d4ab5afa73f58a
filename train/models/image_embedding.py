"""The embedding that measures diversity over seeds: of an image encoder that no loss of the run optimises."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from hyperalign.rewards import Reward
from hyperalign.rewards.images import crop_to_square, normalise
from train.config import TrainConfig
from train.models.load import LOAD_ERRORS

Embed = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [0, 1], on any device -> embeddings (B, D)."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZED, CROPPED = 256, 224
"""Pixels of DINOv2's preprocessing: the shortest side, and the square in the centre of it."""


def diversity_embedding(
    config: TrainConfig, rewards: Mapping[str, Reward], device: torch.device
) -> Embed | None:
    """Returns DINOv2 where validation.diversity_encoder names it, else a reward that is not optimised.

    An optimised reward's own embedding would be trained along with the images. None where there is no other.

    Raises:
        HyperAlignError: the folder is not a whole DINOv2.
    """
    if config.validation.diversity_encoder != Path():
        return load_dinov2(config.validation.diversity_encoder, device)
    judge = next((r for name, r in rewards.items() if name not in config.objective.optimised), None)
    if judge is None:
        return None

    def embed(images_BCHW: Tensor) -> Tensor:
        return judge.embed_images(images_BCHW.to(device))

    return embed


def check_dinov2(folder: Path) -> None:
    """Looks at a folder's configuration. Raises HyperAlignError unless it is that of a DINOv2."""
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise HyperAlignError(
            f"validation.diversity_encoder is {folder}, whose config.json cannot be read "
            f"({first_line(error)}); expected a folder of facebook/dinov2-base or another size. Download it "
            "there, or leave the key empty: a reward that is not optimised then measures diversity."
        ) from error
    if kind != "dinov2":
        raise HyperAlignError(
            f"validation.diversity_encoder is {folder}, which holds a model of the type {kind!r}; expected "
            "'dinov2'. Put facebook/dinov2-base or another size there."
        )


def load_dinov2(folder: Path, device: torch.device) -> Embed:
    """Returns the class token of a frozen DINOv2 in float32. Raises HyperAlignError if it is not whole."""
    from transformers import Dinov2Model

    check_dinov2(folder)
    try:
        loaded: Any = Dinov2Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except LOAD_ERRORS as error:
        raise HyperAlignError(
            f"The DINOv2 in {folder} cannot be read: {first_line(error)}. Copy it again."
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise HyperAlignError(
            f"The DINOv2 in {folder} lacks {len(missing)} tensors, first {missing[0]}. Copy it again."
        )
    model.eval().requires_grad_(False).to(device, torch.float32)

    def embed(images_BCHW: Tensor) -> Tensor:
        square = crop_to_square(images_BCHW.to(device, torch.float32), RESIZED)
        edge = (RESIZED - CROPPED) // 2
        pixels = normalise(square[..., edge:-edge, edge:-edge], IMAGENET_MEAN, IMAGENET_STD)
        return model(pixel_values=pixels).pooler_output

    return embed
