"""The base model of a generation with its method: what draws the images."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from hyperalign.checkpoint import HyperAlign, load, read_header
from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from hyperalign.hosts.diffusers.adapter import Adapter, spec_of
from hyperalign.hosts.diffusers.tiny import TinyBase, load_tiny
from hyperalign.rewards import Reward, loading, tiny
from hyperalign.rewards.ensemble import Ensemble
from hyperalign.rewards.text import CLIP
from hyperalign.tiny.text_encoder import word_ids
from hyperalign.tiny.weights import UNET_CONFIG, part_path
from train.config import TrainConfig
from train.generation.entities import Count
from train.generation.lora import apply_lora, tiny_pipeline
from train.generation.options import Options
from train.models.attention import use_float32_attention
from train.models.base import Base, Conditions, PromptEncoder
from train.models.fingerprint import files_digest
from train.models.load import LOAD_ERRORS, PIPELINES, check_folder, load_base
from train.models.text_encoders import load_text_pipeline, prompt_function
from train.models.tiny import Tiny
from train.sampling import Sampler

PARTS = ("unet", "transformer", "vae", "scheduler", "text_encoder", "tokenizer")
"""With which the names of a base model's subfolders begin."""
HASHED_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class LiveEncoder:
    """Text encoders behind the `PromptEncoder` protocol: each distinct prompt of a call is encoded once."""

    encode: Callable[[Sequence[str]], Conditions]

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Returns the conditions of prompts."""
        distinct = list(dict.fromkeys(prompts))
        rows = [distinct.index(prompt) for prompt in prompts]
        return {name: value[rows] for name, value in self.encode(distinct).items()}


def open_sampler(options: Options, config: TrainConfig, device: torch.device) -> Sampler:
    """Returns the base model with the method's weights; test-time methods get the base model.

    Raises:
        HyperAlignError: a file is missing, damaged or of another base model.
    """
    base, encoder, pipeline = _open_base(options, config, device)
    if options.lora != Path():
        apply_lora(pipeline, _subfolder(config), options.lora, options.strength)
        base.backbone.to(device)
    adapter = None
    if options.hypernetwork != Path():
        hyperalign = load(options.hypernetwork)
        adapter = Adapter(base.backbone, HyperAlign(hyperalign.network.to(device), hyperalign.header))
    return Sampler(
        base, encoder, adapter, steps=config.validation.steps,
        guidance_scale=config.objective.guidance_scale, strength=options.strength,
        bf16=config.optim.bf16 and config.model.base == "tiny",
    )  # fmt: skip


def open_reward(config: TrainConfig, device: torch.device) -> Reward:
    """Returns the weighted sum of the configured rewards, in float32. Raises HyperAlignError."""
    folder, tokenizer, weights = config.data.rewards, _tokenizer(config), config.objective.rewards
    loaded = {name: loading.load(name, folder, device=device, tokenizer_folder=tokenizer) for name in weights}
    return Ensemble([(reward, weights[name]) for name, reward in loaded.items()])


def check_rewards(config: TrainConfig) -> None:
    """Raises HyperAlignError unless the configured rewards and their files are there; reads no weights."""
    for name in config.objective.rewards:
        if name not in tiny.NAMES:
            loading.check_files(name, config.data.rewards, _tokenizer(config))


def _tokenizer(config: TrainConfig) -> Path | None:
    """Returns the folder of CLIP's vocabulary in a base model, if it has one."""
    folder = None if config.model.base == "tiny" else check_folder(config) / "tokenizer"
    return folder if folder and folder.is_dir() else None


def token_counter(config: TrainConfig) -> Count | None:
    """Returns what counts a text's tokens for a U-Net's cross-attention; None for a transformer, without one.

    Raises HyperAlignError if the tokenizer is missing or damaged.
    """
    if config.model.base == "tiny":
        return lambda text: len(word_ids(text))
    if _subfolder(config) != "unet":
        return None
    tokenize = CLIP.load(check_folder(config))
    return lambda text: int(tokenize([text])[0].argmax()) - 1  # the end token has the greatest number


def method_name(options: Options) -> str:
    """Returns the method's short name: that of a hypernetwork is its variant. Raises HyperAlignError."""
    if options.hypernetwork != Path():
        header = read_header(options.hypernetwork)
        return "static" if header.network.conditioning != "full" else header.schedule.variant
    if options.lora != Path():
        return "lora"
    if options.fine_tuned != Path():
        return "fine-tuned"
    return "base" if options.test_time == "none" else options.test_time


def method_digest(path: Path) -> str:
    """Returns the SHA-256 of a method's file; of a folder, that of `files_digest`. Raises HyperAlignError."""
    if path.is_dir():
        return files_digest("", sorted(file for file in path.glob("*") if file.is_file()))
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(HASHED_AT_ONCE):
                digest.update(block)
    except OSError as error:
        raise HyperAlignError(f"{path} cannot be read ({first_line(error)}). Give another file.") from error
    return digest.hexdigest()


def base_digest(config: TrainConfig) -> str:
    """Returns a hash of the base model's files. Raises HyperAlignError if there are none."""
    if config.model.base == "tiny":
        return files_digest("tiny", [part_path(name) for name in ("unet", "autoencoder", "text_encoder")])
    folder = check_folder(config)
    files = [path for path in sorted(folder.glob("*/*")) if path.parent.name.startswith(PARTS)]
    return files_digest(config.model.base, [path for path in files if path.is_file()])


def _open_base(
    options: Options, config: TrainConfig, device: torch.device
) -> tuple[Base, PromptEncoder, Any]:
    """Returns base model, text encoders, and diffusers' pipeline, which puts a LoRA on them."""
    tuned = None if options.fine_tuned == Path() else _backbone_folder(options.fine_tuned, config)
    if config.model.base == "tiny":
        base = Tiny(_tiny(tuned, device))
        if config.optim.bf16 and device.type == "cpu":
            use_float32_attention(base.model.unet)
        return base, base, None if options.lora == Path() else tiny_pipeline(base.model.unet)
    base = load_base(config, device, tuned)
    pipeline = load_text_pipeline(config, device)
    pipeline.register_modules(**{_subfolder(config): base.backbone})
    encode, (length,) = prompt_function(config, pipeline), config.data.text_lengths
    return base, LiveEncoder(lambda prompts: encode(prompts, length)), pipeline


def _tiny(tuned: Path | None, device: torch.device) -> TinyBase:
    """Returns the embedded model, perhaps with a fine-tuned U-Net."""
    model = load_tiny(device)
    if tuned is None:
        return model
    try:
        unet: Any = UNet2DConditionModel.from_pretrained(tuned, local_files_only=True)
    except LOAD_ERRORS as error:
        raise HyperAlignError(f"The model in {tuned} cannot be read: {error}. Copy it again.") from error
    return dataclasses.replace(model, unet=unet.eval().requires_grad_(False).to(device))


def _backbone_folder(folder: Path, config: TrainConfig) -> Path:
    """Returns the folder of a fine-tuned backbone: itself, or inside of a whole model's.

    Raises HyperAlignError if there is none, or its dimensions are not the base model's.
    """
    subfolder = _subfolder(config)
    places = [place for place in (folder, folder / subfolder) if (place / "config.json").is_file()]
    if not places:
        raise HyperAlignError(
            f"There is no config.json in {folder} or {folder / subfolder}; expected a fine-tuned {subfolder} "
            "in diffusers' layout. Give its folder."
        )
    kind: Any = PIPELINES[config.model.base].backbone if config.model.base != "tiny" else UNet2DConditionModel
    own = UNET_CONFIG if config.model.base == "tiny" else check_folder(config) / subfolder
    found, expected = _dimensions(kind, places[0]), _dimensions(kind, own)
    if found != expected:
        wrong = [key for key in expected if found.get(key) != expected[key]]
        details = "; ".join(f"{key} is {found.get(key)} and should be {expected[key]}" for key in wrong)
        raise HyperAlignError(
            f"{places[0]} is not a fine-tuned {config.model.base}: {details}. Give one of the base model's "
            "shape, or the recipe of its base."
        )
    return places[0]


def _dimensions(kind: Any, source: Path | dict[str, Any]) -> dict[str, Any]:
    """Returns the dimensions of a backbone from its configuration, or from the folder with it."""
    try:
        with torch.device("meta"):
            module: nn.Module = kind.from_config(
                source if isinstance(source, dict) else kind.load_config(source)
            )
    except LOAD_ERRORS as error:
        raise HyperAlignError(f"{source} is no {kind.__name__} ({first_line(error)}). Give one.") from error
    return spec_of(module).fingerprint()


def _subfolder(config: TrainConfig) -> str:
    return "unet" if config.model.base == "tiny" else PIPELINES[config.model.base].subfolder
