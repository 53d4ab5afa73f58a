"""What a run reads and where it writes: found, whole and large enough, before anything long starts."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from safetensors import SafetensorError, safe_open
from torch import nn

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from hyperalign.hosts.diffusers.adapter import spec_of
from hyperalign.rewards import loading, tiny
from train.config import EvalConfig, TrainConfig
from train.data.embeddings import CachedPromptEncoder
from train.data.prompts import load_prompts
from train.inputs import needs_images, open_images, read_prompts
from train.models.architectures import FULL_SIZES, architecture, autoencoder
from train.models.image_encoder import image_encoder
from train.models.load import PIPELINES, check_folder
from train.models.text_encoders import text_fingerprint, text_lengths
from train.runtime import SavedStates
from train.setup import require_same_run

META = torch.device("meta")
GIB = 2**30
Found = TypeVar("Found")
READING = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
"""What the libraries raise at files that are missing, damaged or of another model."""


class Complaints:
    """Asks one question after the other and keeps what went wrong."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def hear(self, question: Callable[[], Found]) -> Found | None:
        """Returns the answer, or None where a complaint was made in its place; each is kept once."""
        try:
            return question()
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


def training_prompts(config: TrainConfig) -> list[str]:
    """Returns the prompts to train on. Raises HyperAlignError."""
    return read_prompts(replace(config, eval=EvalConfig(every=0)))[0]


def validation_prompts(config: TrainConfig) -> list[str]:
    """Returns the validation prompts, whatever is wrong with the others. Raises HyperAlignError."""
    if not config.eval.every:
        return []
    if config.eval.file == Path():
        raise HyperAlignError(
            "eval.file is empty; expected a file of validation prompts. Set it, or set eval.every to 0."
        )
    return load_prompts(config.eval.file)[: config.eval.prompts]


def preferred_captions(config: TrainConfig, latent_shape: Sequence[int]) -> list[str]:
    """Reads a batch of preferred latents and returns all captions.

    Raises:
        HyperAlignError: no shards, broken ones, or latents of another autoencoder, size or shape.
    """
    images = open_images(config, latent_fingerprint(config))
    if images is None:
        return []
    count = config.objective.preferred
    latents, _ = images.batch(0, count, np.random.default_rng(0), slice(0, count))
    if tuple(latents.shape[1:]) != tuple(latent_shape):
        raise HyperAlignError(
            f"{config.data.preferred} holds latents of the shape {tuple(latents.shape[1:])}; expected "
            f"{tuple(latent_shape)} for {config.model.base} at {config.model.resolution} pixels. Encode the "
            "images for this recipe into another folder with train/encode.py."
        )
    return images.shards.captions()


def latent_fingerprint(config: TrainConfig) -> str | None:
    """Returns the autoencoder's name in latent shards, None where there is no autoencoder yet."""
    if not needs_images(config) or not (config.model.path / "vae" / "config.json").is_file():
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
            f"objective.rewards or eval.rewards names {name!r}, which knows the words of the embedded tiny "
            f"model alone; expected one of {', '.join(loading.PUBLISHED)}."
        )
    own = config.model.path / "tokenizer"
    for path in loading.check_files(name, config.data.rewards, own if own.is_dir() else None):
        if path.suffix == ".safetensors":
            check_opens(path)


def uncached(config: TrainConfig, texts: Sequence[str]) -> list[int]:
    """Returns how many texts must still be encoded, for each padding. Raises HyperAlignError."""
    lengths = text_lengths(config)
    folder = config.data.embeddings / text_fingerprint(config)
    caches = CachedPromptEncoder(folder, lengths, torch.device("cpu")).caches
    return [len(caches[length].missing(texts)) for length in lengths]


def saved_step(config: TrainConfig) -> int:
    """Returns the step from which the run goes on. Raises HyperAlignError if the folder is another's."""
    state = SavedStates(config.run.out / "states", config.run.keep).newest()
    if state is None:
        return 0
    require_same_run(state["recipe"], config)
    return int(state["step"])


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


def check_writable(folder: Path, option: str) -> None:
    """Raises HyperAlignError unless a folder can be written to or made."""
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise HyperAlignError(
            f"{existing} is not a folder that can be written to. Choose another --{option}."
        )


def free_bytes(folder: Path) -> int:
    """Returns the free space where a folder is or will be."""
    return shutil.disk_usage(_existing(folder)).free


def check_room(needs: Mapping[str, tuple[Path, int]]) -> None:
    """Raises HyperAlignError unless every disk has room for all that goes there.

    Args:
        needs: by what it is, where it goes and its bytes.
    """
    disks: dict[int, list[str]] = {}
    for what, (folder, _) in needs.items():
        disks.setdefault(_existing(folder).stat().st_dev, []).append(what)
    for names in disks.values():
        folder = needs[names[0]][0]
        wanted, free = sum(needs[name][1] for name in names), free_bytes(folder)
        if wanted > free:
            listed = ", ".join(f"{name} {needs[name][1] / GIB:.1f}" for name in names)
            raise HyperAlignError(
                f"The disk of {folder} has {free / GIB:.1f} GiB free; expected {wanted / GIB:.1f} "
                f"({listed}). Free some space, or set run.out or data.embeddings to another disk."
            )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HyperAlignError(
            f"{path} is not whole JSON ({first_line(error)}). Copy or download it again."
        ) from error
