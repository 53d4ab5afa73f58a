"""The rewards' published weights: where they lie, and how they are read without running code.

Official `.pt` and `.pth` files are read by torch.load(weights_only=True), checked, and kept as
`.safetensors` beside the original, in the same layout; from then on that file is read.
"""

from __future__ import annotations

import logging
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoint import save_atomically
from ..errors import HyperAlignError
from ..files import first_line
from .networks import State, dtype_of
from .text import page

LOG = logging.getLogger(__name__)
SUFFIX = ".safetensors"
UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, OSError, EOFError,
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, struct.error,
)  # fmt: skip
"""What torch.load raises on files that are not whole, or not its own."""
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COUNTS = ("position_ids", "relative_position_index")
"""How the only tensors end that some published files hold as integers: counts, which nobody learned."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One published file."""

    path: str
    """Below the rewards' folder, under its published name."""
    url: str
    gigabytes: float
    part: str
    """The submodule of the network it fills; empty for the whole."""
    convert: Callable[[State], State]
    """From the published tensor names to the submodule's."""


def as_published(state: State) -> State:
    """Returns the tensors under the names they have."""
    return state


def load_state(
    network: nn.Module, files: Mapping[Path, WeightFile], device: torch.device, dtype: torch.dtype
) -> State:
    """Reads, checks and casts the tensors of a network on the meta device.

    Raises:
        HyperAlignError: a file is damaged, holds code, or does not fit the network.
    """
    state: State = {}
    for path, file in files.items():
        published = read(path)
        part = _converted(path, file, published)
        _check(path, part, network.get_submodule(file.part).state_dict())
        if path.suffix != SUFFIX:
            _keep(published, path)
        prefix = f"{file.part}." if file.part else ""
        state |= {prefix + key: value for key, value in part.items()}
    return {key: value.to(device, dtype_of(key, dtype)) for key, value in state.items()}


def find(file: WeightFile, folder: Path) -> Path:
    """Returns the converted file, or else the published one. Raises HyperAlignError with where to get it."""
    published = folder / file.path
    converted = published.with_suffix(SUFFIX)
    for path in (converted, published):
        if path.is_file():
            return path
    raise HyperAlignError(
        f"There is no {published.name} ({size_text(file)}) in {published.parent}; get it from "
        f"{page(file.url)} and put it there."
    )


def size_text(file: WeightFile) -> str:
    """Returns a file's size in words."""
    return f"{file.gigabytes:.1f} GB" if file.gigabytes >= 0.1 else f"{file.gigabytes * 1000:.0f} MB"


def read(path: Path) -> State:
    """Returns the tensors of a weight file on the CPU. Raises HyperAlignError, and never runs its code."""
    try:
        state = _read_safetensors(path) if path.suffix == SUFFIX else _read_pickle(path)
    except (SafetensorError, *UNREADABLE) as error:
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise HyperAlignError(
                f"{path.name} holds more than tensors, or is damaged, and was not read further. Get the "
                "published file again, or a .safetensors."
            ) from None  # torch's own text explains how to run the code in the file
        raise HyperAlignError(
            f"{path.name} is not a whole weight file ({first_line(error)}). Download or copy it again."
        ) from error
    for key, value in state.items():
        if not _holds_numbers(key, value):
            raise HyperAlignError(
                f"{path.name}: {key} is of {value.dtype}, {value.layout}, on {value.device}; expected dense "
                "floating-point numbers. It is another model's file, or a copy made smaller; get the "
                "published one."
            )
    return state


def _read_safetensors(path: Path) -> State:
    with safe_open(str(path), framework="pt") as file:
        return {key: cast(Tensor, file.get_tensor(key)) for key in file.keys()}


def _read_pickle(path: Path) -> State:
    mapped = zipfile.is_zipfile(path)  # only the newer of torch's two formats can be mapped into memory
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping):
        raise TypeError(f"it holds a {type(loaded).__name__} instead of named tensors")
    found = dict(cast("Mapping[Any, Any]", state))
    for key, value in found.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise TypeError(f"it holds a {type(value).__name__} named {key!r} among its tensors")
    return found


def _holds_numbers(key: str, value: Tensor) -> bool:
    """Whether a tensor is one that a network can take, or a count."""
    is_dense = value.layout == torch.strided and not (value.is_meta or value.is_nested)
    is_count = key.endswith(COUNTS) and value.dtype in (torch.int64, torch.int32)
    return is_dense and (is_count or value.dtype in PRECISIONS)


def _converted(path: Path, file: WeightFile, published: State) -> State:
    try:
        return file.convert(published)
    except UNREADABLE as error:
        raise HyperAlignError(
            f"{path.name} does not have the published layout ({first_line(error)}). It is another model's "
            "file; get the published one."
        ) from error


def _check(path: Path, found: State, expected: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise HyperAlignError(
            f"{path.name} holds another model: {len(missing)} tensors are missing "
            f"({', '.join(missing[:2]) or 'none'}) and {len(extra)} are unknown "
            f"({', '.join(extra[:2]) or 'none'}). Get the published file again."
        )
    for key, value in found.items():
        if value.shape != expected[key].shape:
            raise HyperAlignError(
                f"{path.name}: {key} has shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}. "
                "It is another model's file; get the published one."
            )
        if not bool(torch.isfinite(value).all()):
            raise HyperAlignError(
                f"{path.name}: {key} holds NaN or infinite values. Download or copy it again."
            )


def _keep(state: State, path: Path) -> None:
    """Writes the published tensors as safetensors; a folder that cannot be written to is no obstacle."""
    try:
        tensors = {key: _alone(value) for key, value in state.items()}
        save_atomically(tensors, path.with_suffix(SUFFIX), {"converted_from": path.name})
    except (OSError, SafetensorError) as error:
        LOG.warning("%s was not converted to safetensors (%s); it is read as it is.", path.name, error)


def _alone(value: Tensor) -> Tensor:
    """Returns a tensor that shares its memory with no other, without a copy where it already is alone."""
    whole = value.untyped_storage().nbytes() == value.nbytes
    return value.contiguous() if whole else value.clone(memory_format=torch.contiguous_format)
