"""Base models from folders in diffusers' layout; the hub only when asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from torch import nn

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from train.config import BaseName, TrainConfig
from train.models.autoencoder import Autoencoder
from train.models.base import Base, Conditions
from train.models.flux import Flux, encode_flux
from train.models.sd3 import StableDiffusion3, encode_sd3
from train.models.stable_diffusion import CLIP_TOKENS, StableDiffusion, encode_sd15, encode_sdxl

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)
"""What the libraries raise at models that are missing, damaged or of another kind."""
READ_WHOLE = (".json", ".txt", ".model")
"""Configurations and tokenizers; the other files are weights."""
SAMPLES, SAMPLE_BYTES = 256, 4096
"""How many places of a file of weights a fingerprint reads, and how many bytes at each."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The classes of one base model in diffusers."""

    backbone: Any
    folder: str
    """Subfolder of the backbone."""
    pipeline: Any
    encode: Callable[[Any, Sequence[str], int], Conditions]
    pads: bool
    """Whether the padding of its text is a choice."""


KINDS: dict[BaseName, Kind] = {
    "sd15": Kind(UNet2DConditionModel, "unet", StableDiffusionPipeline, encode_sd15, False),
    "sdxl": Kind(UNet2DConditionModel, "unet", StableDiffusionXLPipeline, encode_sdxl, False),
    "flux": Kind(FluxTransformer2DModel, "transformer", FluxPipeline, encode_flux, True),
    "sd3": Kind(SD3Transformer2DModel, "transformer", StableDiffusion3Pipeline, encode_sd3, True),
}


def text_lengths(config: TrainConfig) -> tuple[int, ...]:
    """Returns the paddings of the base model's text."""
    return config.data.text_lengths if KINDS[config.model.base].pads else (CLIP_TOKENS,)


def context_tokens(config: TrainConfig, padding: int) -> int:
    """Returns how many text tokens the base model reads at a padding; SD 3.5 reads CLIP's before T5's."""
    return padding + CLIP_TOKENS * (config.model.base == "sd3")


def check_folder(config: TrainConfig) -> Path:
    """Returns the base model's folder. Raises HyperAlignError if it is not there or not whole."""
    model, kind = config.model, KINDS[config.model.base]
    path = model.path
    if path.suffix in (".safetensors", ".ckpt"):
        raise HyperAlignError(
            f"model.path is the single file {path}; expected a folder in diffusers' layout. Convert it with "
            "diffusers' from_single_file(...).save_pretrained(folder)."
        )
    needed = [f"{kind.folder}/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    missing = [name for name in needed if not (path / name).is_file()]
    if missing:
        source = f" or run the same command with --download to fetch {model.hub}" if model.hub else ""
        raise HyperAlignError(
            f"The base model is not whole in {path.resolve()}: {', '.join(missing)} not found. Put "
            f"{model.hub or 'the model'} there in diffusers' layout ({kind.folder}/, vae/, scheduler/, text "
            f"encoders and tokenizers){source}."
        )
    return path


def download(config: TrainConfig) -> None:
    """Fetches the base model into its folder, going on where an earlier try stopped.

    Raises:
        HyperAlignError: no hub name, or the hub refuses.
    """
    from huggingface_hub import snapshot_download

    model = config.model
    if not model.hub:
        raise HyperAlignError("model.hub is empty; expected the base model's name on the hub. Set it.")
    patterns = ["*.json", "*.txt", "*.model", "*/*.safetensors"]
    try:
        snapshot_download(
            model.hub,
            local_dir=model.path,
            allow_patterns=patterns,
            ignore_patterns=["*.fp16.*", "*non_ema*"],
        )
    except (OSError, ValueError) as error:
        raise HyperAlignError(
            f"{model.hub} cannot be downloaded: {error}. Accept its licence on its page and log in with "
            "`hf auth login`, or put the files there yourself."
        ) from error


def load_autoencoder(config: TrainConfig, device: torch.device, which: str = "") -> Autoencoder:
    """Returns the frozen autoencoder. Raises HyperAlignError if it is not there or cannot be read."""
    model = config.model
    if (which or model.vae) == "taesd":
        if not (model.taesd / "config.json").is_file():
            raise HyperAlignError(
                f"model.taesd is {model.taesd}; expected a folder with an AutoencoderTiny (config.json). Put "
                "it there, or set model.vae to full."
            )
        kind, folder = AutoencoderTiny, model.taesd
    else:
        kind, folder = AutoencoderKL, check_folder(config) / "vae"
    try:
        module: Any = kind.from_pretrained(folder)
    except UNREADABLE as error:
        raise HyperAlignError(
            f"The autoencoder in {folder} cannot be read: {error}. Copy it again."
        ) from error
    # SDXL's decoder overflows in float16; bfloat16 holds.
    module.eval().requires_grad_(False).to(device, backbone_dtype(config))
    return Autoencoder(module, config.model.recomputes_images)


def backbone_dtype(config: TrainConfig) -> torch.dtype:
    """Returns the precision of the frozen models."""
    return torch.bfloat16 if config.optim.bf16 else torch.float32


def load_base(config: TrainConfig, device: torch.device) -> Base:
    """Returns the frozen base model. Raises HyperAlignError if it is not there or cannot be read."""
    path, kind = check_folder(config), KINDS[config.model.base]
    try:
        backbone: nn.Module = kind.backbone.from_pretrained(
            path / kind.folder, torch_dtype=backbone_dtype(config), local_files_only=True
        )
        scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    except UNREADABLE as error:
        raise HyperAlignError(f"The base model in {path} cannot be read: {error}. Copy it again.") from error
    backbone.eval().requires_grad_(False).to(device)
    autoencoder = load_autoencoder(config, device)
    return make_base(config, backbone, autoencoder, scheduler.get("prediction_type", "epsilon"))


def make_base(config: TrainConfig, backbone: nn.Module, autoencoder: Autoencoder, prediction: Any) -> Base:
    """Returns a backbone and an autoencoder with the conventions of their family."""
    side = config.model.resolution
    if config.model.base == "flux":
        return Flux(backbone, autoencoder, side, config.objective.guidance_scale)
    if config.model.base == "sd3":
        return StableDiffusion3(backbone, autoencoder, side)
    return StableDiffusion(backbone, autoencoder, side, prediction)


def text_fingerprint(config: TrainConfig) -> str:
    """Returns a name for what the text encoders' outputs depend on: their files' contents and the precision.

    Raises:
        HyperAlignError: no base model's folder, or a file in it that cannot be read.
    """
    digest = hashlib.sha256(f"{config.model.base} {backbone_dtype(config)}".encode())
    for path in sorted(check_folder(config).glob("t*/*")):  # text_encoder*, tokenizer*
        if path.parent.name.startswith(("text_encoder", "tokenizer")) and path.is_file():
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}".encode())
            digest.update(_contents(path))
    return f"{config.model.base}-{digest.hexdigest()[:12]}"


def _contents(path: Path) -> bytes:
    """Returns a file, of weights evenly spaced pieces: reading gigabytes would take minutes."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if path.suffix in READ_WHOLE or size <= SAMPLES * SAMPLE_BYTES:
                return file.read()
            pieces: list[bytes] = []
            for number in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                pieces.append(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise HyperAlignError(f"{path} cannot be read ({first_line(error)}). Copy it again.") from error
    return b"".join(pieces)


def text_encoder(config: TrainConfig, device: torch.device) -> Callable[[Sequence[str], int], Conditions]:
    """Returns the base model's text encoders as one function, in the precision of the backbone.

    Raises:
        HyperAlignError: an encoder or a tokenizer is not there or cannot be read.
    """
    kind, folder = KINDS[config.model.base], check_folder(config)
    without: dict[str, Any] = {kind.folder: None, "vae": None}
    try:
        pipeline: Any = kind.pipeline.from_pretrained(
            folder, torch_dtype=backbone_dtype(config), local_files_only=True, **without
        )
    except UNREADABLE as error:
        raise HyperAlignError(
            f"The text encoders in {folder} cannot be read: {first_line(error)} Copy model_index.json and "
            "the folders text_encoder* and tokenizer* from the base model again."
        ) from error
    pipeline.to(device)

    @torch.no_grad()
    def encode(prompts: Sequence[str], length: int) -> Conditions:
        return kind.encode(pipeline, prompts, length)

    return encode
