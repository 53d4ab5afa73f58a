"""Loads base models from folders in diffusers' layout; downloads them from the hub on request."""

from __future__ import annotations

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
from train.models.base import Conditions
from train.models.flux import Flux, encode_flux
from train.models.sd3 import StableDiffusion3, encode_sd3
from train.models.stable_diffusion import StableDiffusion, encode_sd15, encode_sdxl

LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)
"""What diffusers and transformers raise for models that are missing, damaged or of another class."""


LoadedBase = StableDiffusion | StableDiffusion3 | Flux
"""Each is a `Base` with an autoencoder."""


@dataclass(frozen=True, slots=True)
class PipelineClasses:
    """The classes of one base model in diffusers."""

    backbone: Any
    subfolder: str
    """Subfolder of the backbone."""
    pipeline: Any
    encode_prompts: Callable[[Any, Sequence[str], int], Conditions]
    """The pipeline, prompts and the length they are padded to -> conditions."""
    variable_length: bool
    """Whether prompts can be padded to different lengths."""


PIPELINES: dict[BaseName, PipelineClasses] = {
    "sd15": PipelineClasses(UNet2DConditionModel, "unet", StableDiffusionPipeline, encode_sd15, False),
    "sdxl": PipelineClasses(UNet2DConditionModel, "unet", StableDiffusionXLPipeline, encode_sdxl, False),
    "flux": PipelineClasses(FluxTransformer2DModel, "transformer", FluxPipeline, encode_flux, True),
    "sd3": PipelineClasses(SD3Transformer2DModel, "transformer", StableDiffusion3Pipeline, encode_sd3, True),
}


def check_folder(config: TrainConfig) -> Path:
    """Returns the base model's folder. Raises HyperAlignError if it is missing or incomplete."""
    model, subfolder = config.model, PIPELINES[config.model.base].subfolder
    path = model.path
    if path.suffix in (".safetensors", ".ckpt"):
        raise HyperAlignError(
            f"model.path is the single file {path}; expected a folder in diffusers' layout. Convert it with "
            "diffusers' from_single_file(...).save_pretrained(folder)."
        )
    needed = [f"{subfolder}/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    missing = [name for name in needed if not (path / name).is_file()]
    if missing:
        source = f" or run the same command with --download to fetch {model.hub}" if model.hub else ""
        raise HyperAlignError(
            f"The base model in {path.resolve()} is incomplete: {', '.join(missing)} not found. Put "
            f"{model.hub or 'the model'} there in diffusers' layout ({subfolder}/, vae/, scheduler/, text "
            f"encoders and tokenizers){source}."
        )
    return path


def base_of_folder(folder: Path) -> BaseName:
    """Returns which base model a folder in diffusers' layout holds. Raises HyperAlignError if none."""
    path = folder / "model_index.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HyperAlignError(
            f"{path} cannot be read ({first_line(error)}); expected a model in diffusers' layout. Give such "
            "a folder."
        ) from error
    for base, classes in PIPELINES.items():
        if classes.pipeline.__name__ == kind:
            return base
    known = ", ".join(classes.pipeline.__name__ for classes in PIPELINES.values())
    raise HyperAlignError(f"{folder} is a {kind}; expected one of {known}. Give another folder.")


def download(config: TrainConfig) -> None:
    """Downloads the base model into its folder; an interrupted download resumes.

    Raises:
        HyperAlignError: there is no hub name, or the hub refuses.
    """
    from huggingface_hub import snapshot_download

    model = config.model
    if not model.hub:
        raise HyperAlignError("model.hub is empty; expected the base model's name on the hub. Set it.")
    try:
        snapshot_download(
            model.hub,
            local_dir=model.path,
            allow_patterns=["*.json", "*.txt", "*.model", "*/*.safetensors"],
            ignore_patterns=["*.fp16.*", "*non_ema*"],
        )
    except (OSError, ValueError) as error:
        raise HyperAlignError(
            f"{model.hub} cannot be downloaded: {error}. Accept its licence on its page and log in with "
            "`hf auth login`, or put the files there yourself."
        ) from error


def load_autoencoder(config: TrainConfig, device: torch.device, which: str = "") -> Autoencoder:
    """Returns the frozen autoencoder. Raises HyperAlignError if it is missing or cannot be read."""
    model = config.model
    if (which or model.vae) == "taesd":
        if not (model.taesd / "config.json").is_file():
            raise HyperAlignError(
                f"model.taesd is {model.taesd}; expected a folder with an AutoencoderTiny (config.json). Put "
                "it there, or set model.vae to full."
            )
        autoencoder, folder = AutoencoderTiny, model.taesd
    else:
        autoencoder, folder = AutoencoderKL, check_folder(config) / "vae"
    try:
        module: Any = autoencoder.from_pretrained(folder)
    except LOAD_ERRORS as error:
        raise HyperAlignError(
            f"The autoencoder in {folder} cannot be read: {error}. Copy it again."
        ) from error
    # SDXL's decoder overflows in float16; bfloat16 holds.
    module.eval().requires_grad_(False).to(device, backbone_dtype(config))
    return Autoencoder(module, config.model.recomputes_images)


def backbone_dtype(config: TrainConfig) -> torch.dtype:
    """Returns the precision of the frozen models."""
    return torch.bfloat16 if config.optim.bf16 else torch.float32


def load_base(config: TrainConfig, device: torch.device, backbone_folder: Path | None = None) -> LoadedBase:
    """Returns the frozen base model, perhaps with the U-Net or transformer of another folder.

    Raises HyperAlignError if it is missing or cannot be read.
    """
    path, classes = check_folder(config), PIPELINES[config.model.base]
    try:
        backbone: nn.Module = classes.backbone.from_pretrained(
            backbone_folder or path / classes.subfolder,
            torch_dtype=backbone_dtype(config), local_files_only=True,
        )  # fmt: skip
        scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    except LOAD_ERRORS as error:
        raise HyperAlignError(f"The base model in {path} cannot be read: {error}. Copy it again.") from error
    backbone.eval().requires_grad_(False).to(device)
    autoencoder = load_autoencoder(config, device)
    return make_base(config, backbone, autoencoder, scheduler.get("prediction_type", "epsilon"))


def make_base(
    config: TrainConfig, backbone: nn.Module, autoencoder: Autoencoder, prediction: Any
) -> LoadedBase:
    """Returns a backbone and an autoencoder with the conventions of their family."""
    side = config.model.resolution
    if config.model.base == "flux":
        return Flux(backbone, autoencoder, side)
    if config.model.base == "sd3":
        return StableDiffusion3(backbone, autoencoder, side)
    return StableDiffusion(backbone, autoencoder, side, prediction)
