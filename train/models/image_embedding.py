"""The embeddings in which diversity is measured: of an image encoder that nothing optimises."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from hyperalign.rewards import Reward, tiny
from hyperalign.rewards.images import crop_to_square, normalise
from train.config import TrainConfig
from train.models.load import LOAD_ERRORS

Embed = Callable[[Tensor], Tensor]
"""RGB images (B, 3, H, W) in [0, 1], on any device -> embeddings (B, D)."""

KEY = "validation.diversity_encoder"
PREPROCESSING = "preprocessor_config.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def diversity_embedding(
    config: TrainConfig, rewards: Mapping[str, Reward], device: torch.device
) -> Embed | None:
    """Returns the encoder that validation.diversity_encoder names, else a reward that is not optimised.

    An optimised reward's own embedding would be trained along with the images. None where there is no other.

    Raises:
        HyperAlignError: the folder has no whole image encoder.
    """
    if config.validation.diversity_encoder != Path():
        return load_encoder(config.validation.diversity_encoder, device, KEY)
    name = _first_unoptimised(config, rewards)
    if name is None:
        return None
    judge = rewards[name]

    def embed(images_BCHW: Tensor) -> Tensor:
        return judge.embed_images(images_BCHW.to(device))

    return embed


def unoptimised_reward(config: TrainConfig) -> str:
    """Returns the first reward that a recipe measures and does not optimise.

    Raises:
        HyperAlignError: there is none.
    """
    measured = (tiny.NAMES[1],) if config.model.base == "tiny" else config.validation.rewards
    found = _first_unoptimised(config, measured)
    if found is None:
        raise HyperAlignError(
            "The recipe measures no reward that it does not optimise (validation.rewards), whose embedding "
            "would measure diversity. Name the folder of an image encoder, such as facebook/dinov2-base."
        )
    return found


def _first_unoptimised(config: TrainConfig, measured: Iterable[str]) -> str | None:
    return next((name for name in measured if name not in config.objective.optimised), None)


def encoder_files(folder: Path, option: str = "--diversity-encoder") -> list[Path]:
    """Returns the files of an encoder in transformers' layout. Raises HyperAlignError if some are missing.

    `option` is where the user named the folder.
    """
    files = [folder / "config.json", folder / PREPROCESSING]
    missing = [path.name for path in files if not path.is_file()]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        missing.append("model.safetensors")
    if missing:
        raise HyperAlignError(
            f"{option} {folder} has no {', '.join(missing)}; expected an image encoder in "
            "transformers' layout. `hf download facebook/dinov2-base --local-dir FOLDER` gets one (0.3 GB)."
        )
    return [*files, *weights]


def load_encoder(folder: Path, device: torch.device, option: str = "--diversity-encoder") -> Embed:
    """Loads an image encoder in float32, frozen; its embedding is the pooled output.

    Raises HyperAlignError on missing or damaged files, or a model of another kind.
    """
    from transformers import AutoModel

    encoder_files(folder, option)
    shortest, side, mean, std = _preprocessing(folder / PREPROCESSING)
    try:
        loaded: Any = AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except LOAD_ERRORS as error:
        raise HyperAlignError(
            f"{option} {folder} cannot be loaded ({first_line(error)}); expected an image encoder "
            "such as facebook/dinov2-base. Download it again."
        ) from error
    model, report = loaded
    if model.main_input_name != "pixel_values":
        raise HyperAlignError(
            f"{option} {folder} is a {type(model).__name__}, which does not take images alone; "
            "expected an image encoder such as facebook/dinov2-base."
        )
    if missing := sorted(report["missing_keys"]):
        raise HyperAlignError(
            f"{option} {folder} lacks {len(missing)} tensors, first {missing[0]}. Copy it again."
        )
    model.to(device).eval().requires_grad_(False)

    def embed(images_BCHW: Tensor) -> Tensor:
        squares = crop_to_square(images_BCHW.to(device, torch.float32), shortest)
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
