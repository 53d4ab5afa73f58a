"""Puts a LoRA file on a base model, as diffusers reads it: kohya's, diffusers' and peft's names of layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from train.models.load import LOAD_ERRORS

PEFT_PREFIX = "base_model.model."
"""Of every key that peft's save_pretrained writes."""
DOWN = ("lora_A.weight", "lora_down.weight", "lora.down.weight")
"""How the names of the first matrix of each layer end."""
PREFIXES = ("unet.", "transformer.", "lora_", "text_encoder", "diffusion_model.")
"""With which the names of other LoRA files begin."""


def tiny_pipeline(unet: nn.Module) -> Any:
    """Returns a pipeline around the embedded model's U-Net, to read LoRA files with."""
    pipeline: Any = StableDiffusionPipeline
    return pipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def apply_lora(pipeline: Any, subfolder: str, path: Path, strength: float) -> None:
    """Puts a LoRA on a pipeline's backbone, and on its text encoders where the file has weights for them.

    Args:
        pipeline: diffusers' pipeline with the backbone.
        subfolder: the backbone's name in it, unet or transformer.
        path: the file.
        strength: of the LoRA.

    Raises:
        HyperAlignError: no such file, not a LoRA, or one of another base model.
    """
    tensors, scale = read_lora(path, subfolder)
    advice = f"Give a LoRA that was trained for this base model ({type(pipeline).__name__})."
    try:
        pipeline.load_lora_weights(tensors)
    except LOAD_ERRORS as error:
        raise HyperAlignError(
            f"The LoRA {path.name} does not fit the base model ({first_line(error)}). {advice}"
        ) from error
    layers, found = sum(key.endswith(DOWN) for key in tensors), _adapted_layers(pipeline)
    if found == 0 or found < layers:
        raise HyperAlignError(
            f"The LoRA {path.name} does not fit the base model: it has {layers} layers, the first "
            f"{next(iter(tensors))}, and the model has {found} of them. {advice}"
        )
    adapters: dict[str, list[str]] = pipeline.get_list_adapters()
    (name,) = {name for names in adapters.values() for name in names}
    pipeline.set_adapters([name], [strength * scale])


def read_lora(path: Path, subfolder: str) -> tuple[dict[str, Tensor], float]:
    """Returns a file's tensors under names that diffusers knows, and the scale that peft keeps beside it.

    Raises HyperAlignError if it is missing, damaged, no LoRA, or of peft without its adapter_config.json.
    """
    if not path.is_file():
        raise HyperAlignError(f"There is no LoRA {path}. Give a .safetensors file.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise HyperAlignError(
            f"{path} is not a whole safetensors file ({first_line(error)}). Download or copy it again."
        ) from error
    if not any("lora" in key.lower() for key in tensors):
        raise HyperAlignError(
            f"{path} is no LoRA: none of its {len(tensors)} tensors is a lora_A, lora_B, lora_down or "
            "lora_up. Give a LoRA, or a fine-tuned model's folder with --fine-tuned."
        )
    if all(key.startswith(PEFT_PREFIX) for key in tensors):
        named = {f"{subfolder}.{key.removeprefix(PEFT_PREFIX)}": value for key, value in tensors.items()}
        return named, _peft_scale(path)
    if not any(key.startswith(PREFIXES) for key in tensors):
        return {f"{subfolder}.{key}": value for key, value in tensors.items()}, 1.0
    return tensors, 1.0


def _peft_scale(path: Path) -> float:
    """Returns alpha / rank, which peft keeps in adapter_config.json. Raises HyperAlignError."""
    config = path.with_name("adapter_config.json")
    try:
        found = cast("dict[str, Any]", json.loads(config.read_text(encoding="utf-8")))
        rank = float(found["r"])
        return float(found["lora_alpha"]) / (rank**0.5 if found.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise HyperAlignError(
            f"{path.name} is a LoRA of peft, but {config} cannot be read ({first_line(error)}); expected r "
            "and lora_alpha. Copy that file from where the LoRA comes from."
        ) from error


def _adapted_layers(pipeline: Any) -> int:
    """Returns how many layers of a pipeline's networks have a LoRA."""
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    names = (name for network in networks for name, _ in network.named_parameters())
    return sum(".lora_A." in name for name in names)
