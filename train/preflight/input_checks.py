"""Checks of the files that a run reads and the folders that it writes, before anything long starts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from safetensors import SafetensorError, safe_open
from torch import nn

from hyperalign.errors import HyperAlignError
from hyperalign.files import check_writable, existing_parent, first_line, free_bytes
from hyperalign.hosts.diffusers.adapter import spec_of
from hyperalign.rewards import loading, tiny
from hyperalign.rewards.weights import find
from hyperalign.schedule import Schedule
from hyperalign.targets import BaseSpec
from train.checkpoints import TrainingCheckpoints, require_continuation
from train.config import TrainConfig
from train.data.embeddings import CachedPromptEncoder
from train.inputs import open_preference_shards
from train.models.architectures import FULL_SIZES, architecture, autoencoder
from train.models.image_embedding import KEY, encoder_files
from train.models.image_encoder import image_encoder
from train.models.load import PIPELINES, check_folder
from train.models.text_encoders import text_fingerprint, text_lengths
from train.start import check_architecture, new_header

META = torch.device("meta")
GIB = 2**30
Found = TypeVar("Found")
READING = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
"""What the libraries raise at files that are missing, damaged or of another model."""


class Problems:
    """The errors of several checks, which run one after the other whatever fails."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def run(self, check: Callable[[], Found]) -> Found | None:
        """Returns what a check returns, or None and keeps its HyperAlignError; equal ones are kept once."""
        try:
            return check()
        except HyperAlignError as error:
            if str(error) not in self.found:
                self.found.append(str(error))
        return None


def check_base(config: TrainConfig) -> None:
    """Opens the weights of backbone and autoencoder. Raises HyperAlignError."""
    folder = check_folder(config)
    for part in (PIPELINES[config.model.base].subfolder, "vae"):
        check_weights(folder / part, "diffusion_pytorch_model")


def check_weights(folder: Path, stem: str) -> None:
    """Opens all files of a model's weights. Raises HyperAlignError if one is missing or not whole."""
    index = folder / f"{stem}.safetensors.index.json"
    files = [folder / f"{stem}.safetensors"]
    if index.is_file():
        files = [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing and any(folder.glob("*.bin")):  # the older form, which is as good
        return
    if missing:
        raise HyperAlignError(
            f"{folder} lacks {', '.join(missing)}; expected all of the weights. Copy it again."
        )
    for path in files:
        check_opens(path)


def check_opens(path: Path) -> None:
    """Reads the header of a safetensors file. Raises HyperAlignError if it is not whole."""
    try:
        with safe_open(str(path), framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        raise HyperAlignError(
            f"{path} is not a whole safetensors file ({first_line(error)}). Copy or download it again."
        ) from error


def check_encoders(config: TrainConfig) -> None:
    """Looks for the text encoders that model_index.json names. Raises HyperAlignError."""
    folder = check_folder(config)
    index = folder / "model_index.json"
    if not index.is_file():
        raise HyperAlignError(
            f"{folder} lacks model_index.json, which names its text encoders. Copy the whole folder again."
        )
    names = [name for name, kind in _read_json(index).items() if isinstance(kind, list) and kind[0]]
    encoders = [name for name in names if name.startswith("text_encoder")]
    for name in encoders:
        check_weights(folder / name, "model")
    tokenizers = [name for name in names if name.startswith("tokenizer")]
    missing = [name for name in tokenizers if not any((folder / name).glob("*.*"))]
    if missing:
        raise HyperAlignError(f"{folder} lacks the folder {', '.join(missing)}. Copy it from the base model.")


def backbone_of(config: TrainConfig) -> nn.Module:
    """Returns the backbone that config.json describes, on the meta device; the usual one if there is none.

    Raises:
        HyperAlignError: the file cannot be read, or is of another base model.
    """
    kind = PIPELINES[config.model.base]
    folder = config.model.path / kind.subfolder
    if not (folder / "config.json").is_file():
        with META:
            return architecture(config.model.base, FULL_SIZES[config.model.base])
    model = _from_config(kind.backbone, folder)
    family = spec_of(model).family
    if family != config.model.base:
        raise HyperAlignError(
            f"{folder} holds a {family} model; expected {config.model.base}. Correct model.path or .base."
        )
    return model


def autoencoder_of(config: TrainConfig) -> nn.Module:
    """Returns what decodes in training, on the meta device. Raises HyperAlignError if it cannot be read."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    model, tiny_one = config.model, config.model.vae == "taesd"
    kind, folder = (AutoencoderTiny, model.taesd) if tiny_one else (AutoencoderKL, model.path / "vae")
    if (folder / "config.json").is_file():
        return _from_config(kind, folder)
    if tiny_one:
        raise HyperAlignError(
            f"model.taesd is {model.taesd}; expected a folder with an AutoencoderTiny (config.json). Put it "
            "there, or set model.vae to full."
        )
    with META:
        return autoencoder(model.base)


def _from_config(kind: Any, folder: Path) -> nn.Module:
    try:
        with META:
            return kind.from_config(kind.load_config(folder, local_files_only=True))
    except READING as error:
        raise HyperAlignError(
            f"{folder / 'config.json'} is not of a {kind.__name__} ({first_line(error)}). Copy it again."
        ) from error


def preference_captions(config: TrainConfig, channels: int) -> tuple[list[str], str]:
    """Reads a batch of preference latents; returns all captions, and how many images have which size.

    Raises:
        HyperAlignError: no shards, broken ones, or latents of another autoencoder, size or shape.
    """
    images = open_preference_shards(config, latent_fingerprint(config))
    if images is None:
        return [], "none"
    shards, count = images.shards, config.objective.preference_batch
    images.batch(0, count, np.random.default_rng(0), slice(0, count))
    for (height, width), shape in shards.shapes.items():
        expected = (channels, height // 8, width // 8)
        if shape != expected:
            raise HyperAlignError(
                f"{config.data.preference} holds latents of the shape {shape}; expected {expected} for "
                f"{config.model.base} and images of {width} x {height} pixels. Encode the images for this "
                "recipe into another folder with train/encode.py."
            )
    return shards.captions(), shards.sizes()


def latent_fingerprint(config: TrainConfig) -> str | None:
    """Returns the autoencoder's name in latent shards, None where there is no autoencoder yet."""
    if (
        not (config.objective.needs_preference_images or config.objective.needs_pairs)
        or not (config.model.path / "vae" / "config.json").is_file()
    ):
        return None
    try:
        return image_encoder(config, torch.device("cpu")).fingerprint
    except READING as error:
        raise HyperAlignError(
            f"{config.model.path / 'vae'} holds no whole autoencoder ({first_line(error)}). Copy it again."
        ) from error


def check_reward(config: TrainConfig, name: str) -> None:
    """Looks for a reward's weights and vocabulary. Raises HyperAlignError."""
    if name in tiny.NAMES:
        raise HyperAlignError(
            f"objective.rewards or validation.rewards names {name!r}, which has the vocabulary of the "
            f"embedded tiny model; expected one of {', '.join(loading.PUBLISHED)}."
        )
    recipe = loading.published_reward(name)
    for file in recipe.files:
        path = find(file, config.data.rewards)
        if path.suffix == ".safetensors":
            check_opens(path)
    if recipe.vocabulary is not None:
        own = config.model.path / "tokenizer"
        recipe.vocabulary.load(config.data.rewards, own if own.is_dir() else None)


def check_diversity_encoder(config: TrainConfig) -> None:
    """Looks at the encoder that a recipe measures diversity by. Raises HyperAlignError."""
    folder = config.validation.diversity_encoder
    if folder != Path() and config.validation.every:
        encoder_files(folder, KEY)
        check_weights(folder, "model")


def check_start(config: TrainConfig, spec: BaseSpec) -> None:
    """Looks at the hypernetwork that a new run begins with. Raises HyperAlignError if it does not fit."""
    if config.run.init_from != Path() and not saved_step(config):
        check_architecture(config.run.init_from, new_header(config, spec, Schedule("S")))


def uncached(config: TrainConfig, texts: Sequence[str]) -> list[int]:
    """Returns how many texts must still be encoded, for each padding. Raises HyperAlignError."""
    folder = config.data.embeddings / text_fingerprint(config)
    return CachedPromptEncoder(folder, text_lengths(config), torch.device("cpu")).count_missing(texts)


def saved_step(config: TrainConfig) -> int:
    """Returns the step from which the run resumes. Raises HyperAlignError if run.out holds another run."""
    saved = TrainingCheckpoints(config.run.out / "checkpoints", config.run.keep_checkpoints).newest()
    if saved is None:
        return 0
    require_continuation(saved, config)
    return int(saved["step"])


def check_trackers(config: TrainConfig) -> None:
    """Raises HyperAlignError if Accelerate has no such tracker, or its package is missing."""
    known, installed = (sorted(map(str, names)) for names in (LoggerType, get_available_trackers()))
    for name in config.run.trackers:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise HyperAlignError(
                f"run.trackers names {name!r}, which is no tracker. {hint}Known trackers: {', '.join(known)}."
            )
    missing = [name for name in config.run.trackers if name != "all" and name not in installed]
    if missing:
        raise HyperAlignError(
            f"run.trackers names {', '.join(missing)}, which is not installed. Run pip install "
            f"{' '.join(missing)}, or take it out; log.jsonl is always written."
        )


def check_folder_writable(folder: Path, option: str) -> None:
    """Raises HyperAlignError unless a folder can be written to or made; makes nothing."""
    existing = existing_parent(folder)
    if not existing.is_dir():
        raise HyperAlignError(
            f"{existing} is not a folder that can be written to. Choose another --{option}."
        )
    check_writable(existing / "file", f"Choose another --{option}.")


def check_room(needs: Mapping[str, tuple[Path, int]]) -> None:
    """Raises HyperAlignError unless every disk has room for all that is written to it.

    Args:
        needs: folder and bytes, by the name of what is written.
    """
    disks: dict[int, list[str]] = {}
    for name, (folder, _) in needs.items():
        disks.setdefault(existing_parent(folder).stat().st_dev, []).append(name)
    for names in disks.values():
        folder = needs[names[0]][0]
        wanted, free = sum(needs[name][1] for name in names), free_bytes(folder)
        if wanted > free:
            listed = ", ".join(f"{name} {needs[name][1] / GIB:.1f}" for name in names)
            raise HyperAlignError(
                f"The disk of {folder} has {free / GIB:.1f} GiB free; expected {wanted / GIB:.1f} "
                f"({listed}). Free some space, or set run.out or data.embeddings to another disk."
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HyperAlignError(
            f"{path} is not whole JSON ({first_line(error)}). Copy or download it again."
        ) from error
