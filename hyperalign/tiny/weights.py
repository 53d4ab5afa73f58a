"""The committed weights of the tiny model: their paths, reading and writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint import save_atomically
from ..errors import HyperAlignError

FOLDER = Path(__file__).parent / "weights"
HYPERNETWORKS = Path(__file__).parent / "hypernetworks"
HEADER_KEY = "hyperalign_tiny"

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 128,
    "attention_head_dim": (2, 4, 4),  # diffusers reads this as the number of heads
}
"""Arguments of diffusers' UNet2DConditionModel: SD's anatomy, cross-attention at every level."""

AUTOENCODER_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 64,
}
"""Arguments of diffusers' AutoencoderKL: 64x64 pixels to 4x16x16 latents."""

NOISE_SCHEDULE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
"""Arguments of every diffusers scheduler for this model; Stable Diffusion's own."""


def part_path(name: str, folder: Path = FOLDER) -> Path:
    """Returns the file of one part, such as `unet` or `reward`."""
    return folder / f"{name}.safetensors"


def save_part(name: str, state: dict[str, Tensor], header: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Writes one part in fp16 with a header about its training. Raises OSError."""
    tensors = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()}
    save_atomically(tensors, part_path(name, folder), {HEADER_KEY: json.dumps(header)})
    return part_path(name, folder)


def load_part(name: str, folder: Path = FOLDER) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the float32 tensors of one part and its header.

    Raises:
        HyperAlignError: the file is missing or damaged.
    """
    path = part_path(name, folder)
    if not path.is_file():
        raise HyperAlignError(
            f"The embedded model's part {path.name} is missing from {path.parent}. Install the pack again, "
            "or rebuild it with `python train/tiny/build.py`."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER_KEY])
            state = {key: cast(Tensor, file.get_tensor(key)).float() for key in file.keys()}
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise HyperAlignError(
            f"The embedded model's part {path.name} cannot be read ({error!r}). Install the pack again."
        ) from error
    return state, header
