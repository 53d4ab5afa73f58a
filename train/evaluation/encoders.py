"""The image encoder in whose embeddings diversity is measured: one that no method optimises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from hyperalign.rewards.images import crop_to_square, normalise

Embed = Callable[[Tensor], Tensor]
"""RGB images (B, 3, H, W) in [0, 1] -> embeddings (B, D)."""

PREPROCESSING = "preprocessor_config.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encoder_files(folder: Path) -> list[Path]:
    """Returns the files of an encoder in transformers' layout. Raises HyperAlignError if some are missing."""
    files = [folder / "config.json", folder / PREPROCESSING]
    missing = [path.name for path in files if not path.is_file()]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        missing.append("model.safetensors")
    if missing:
        raise HyperAlignError(
            f"--diversity-encoder {folder} has no {', '.join(missing)}; expected an image encoder in "
            "transformers' layout. `hf download facebook/dinov2-base --local-dir FOLDER` gets one (0.3 GB)."
        )
    return [*files, *weights]


def load_encoder(folder: Path, device: torch.device) -> Embed:
    """Loads an image encoder in float32, frozen; its embedding is the pooled output.

    Raises HyperAlignError on missing or damaged files, or a model of another kind.
    """
    from transformers import AutoModel

    encoder_files(folder)
    shortest, side, mean, std = _preprocessing(folder / PREPROCESSING)
    try:
        model: Any = AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise HyperAlignError(
            f"--diversity-encoder {folder} cannot be loaded ({first_line(error)}); expected an image encoder "
            "such as facebook/dinov2-base. Download it again."
        ) from error
    if model.main_input_name != "pixel_values":
        raise HyperAlignError(
            f"--diversity-encoder {folder} is a {type(model).__name__}, which does not take images alone; "
            "expected an image encoder such as facebook/dinov2-base."
        )
    model.to(device).eval().requires_grad_(False)

    def embed(images_BCHW: Tensor) -> Tensor:
        squares = crop_to_square(images_BCHW, shortest)
        edge = (shortest - side) // 2
        pixels = squares[..., edge : edge + side, edge : edge + side]
        found: Any = model(pixel_values=normalise(pixels, mean, std))
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled

    return embed


def _preprocessing(path: Path) -> tuple[int, int, tuple[float, ...], tuple[float, ...]]:
    """Returns the shortest side after resizing, the central crop's side, and the pixels' mean and std."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        size = found["size"]
        shortest = int(size.get("shortest_edge") or size["height"])
        side = int(found["crop_size"]["height"]) if found.get("do_center_crop", True) else shortest
        mean, std = found.get("image_mean", IMAGENET_MEAN), found.get("image_std", IMAGENET_STD)
        if not 0 < side <= shortest:
            raise ValueError(f"a crop of {side} pixels from {shortest}")
        return shortest, side, tuple(map(float, mean)), tuple(map(float, std))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HyperAlignError(
            f"{path} cannot be used ({first_line(error)}); expected size, crop_size, image_mean and "
            "image_std as DINOv2's has them. Download the encoder again."
        ) from error
