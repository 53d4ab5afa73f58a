"""The rewards' published weights: finding, reading without running code, checking, converting.

Official `.pt` and `.pth` files are read by torch.load(weights_only=True), checked, and saved as
`.safetensors` beside the original, in the same layout; that file is read until the original is replaced.
"""

from __future__ import annotations

import logging
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoint import not_finite, save_atomically
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
"""The errors of torch.load on files that are damaged or of another format."""
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = ("position_ids", "relative_position_index")
"""The endings of the only integer tensors in published files: indices, which are not learned."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One published file."""

    path: str
    """Relative to the rewards' folder, with its published name."""
    url: str
    gigabytes: float
    part: str
    """The submodule whose weights it contains; empty for the whole network."""
    convert: Callable[[State], State]
    """From the published tensor names to those of the submodule."""


def as_published(state: State) -> State:
    """Returns the tensors unchanged."""
    return state


def load_state(
    network: nn.Module, files: Mapping[Path, WeightFile], device: torch.device, dtype: torch.dtype
) -> State:
    """Reads, checks and casts the tensors of a network on the meta device.

    Raises:
        HyperAlignError: a file is damaged, contains code, or does not fit the network.
    """
    state: State = {}
    for path, file in files.items():
        published = read(path)
        part = _converted(path, file, published)
        _check(path, part, network.get_submodule(file.part).state_dict())
        if path.suffix != SUFFIX:
            _save_converted(published, path)
        prefix = f"{file.part}." if file.part else ""
        state |= {prefix + key: value for key, value in part.items()}
    return {key: value.to(device, dtype_of(key, dtype)) for key, value in state.items()}


def present(file: WeightFile, folder: Path) -> Path | None:
    """Returns the converted file, or the published one if it is newer or alone; None if there is neither."""
    published = folder / file.path
    found = [path for path in (published.with_suffix(SUFFIX), published) if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def find(file: WeightFile, folder: Path) -> Path:
    """Returns the file as `present` does. Raises HyperAlignError with its source if there is none."""
    path = present(file, folder)
    if path is not None:
        return path
    published = folder / file.path
    raise HyperAlignError(
        f"There is no {published.name} ({size_text(file)}) in {published.parent}; get it from "
        f"{page(file.url)} and put it there."
    )


def size_text(file: WeightFile) -> str:
    """Returns a file's size with its unit."""
    return f"{file.gigabytes:.1f} GB" if file.gigabytes >= 0.1 else f"{file.gigabytes * 1000:.0f} MB"


def read(path: Path) -> State:
    """Returns the tensors of a weight file on the CPU; never runs its code. Raises HyperAlignError."""
    try:
        state = _read_safetensors(path) if path.suffix == SUFFIX else _read_pickle(path)
    except (SafetensorError, *UNREADABLE) as error:
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise HyperAlignError(
                f"{path.name} contains more than tensors, or is damaged, and was not read further. Get the "
                "published file again, or a .safetensors."
            ) from None  # torch's message explains how to run the code in the file
        raise HyperAlignError(
            f"{path.name} is not a whole weight file ({first_line(error)}). Download or copy it again."
        ) from error
    for key, value in state.items():
        if not _is_numeric(key, value):
            raise HyperAlignError(
                f"{path.name}: {key} is of {value.dtype}, {value.layout}, on {value.device}; expected dense "
                "floating-point numbers. It is another model's file, or a quantised copy; get the "
                "published one."
            )
    return state


def _read_safetensors(path: Path) -> State:
    with safe_open(str(path), framework="pt") as file:
        return {key: cast(Tensor, file.get_tensor(key)) for key in file.keys()}


def _read_pickle(path: Path) -> State:
    mapped = zipfile.is_zipfile(path)  # only the newer of torch's two formats can be memory-mapped
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping):
        raise TypeError(f"it contains a {type(loaded).__name__} instead of named tensors")
    found = dict(cast("Mapping[Any, Any]", state))
    for key, value in found.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise TypeError(f"it contains a {type(value).__name__} named {key!r} among its tensors")
    return found


def _is_numeric(key: str, value: Tensor) -> bool:
    """Whether a tensor is dense with a dtype that a network can take."""
    is_dense = value.layout == torch.strided and not (value.is_meta or value.is_nested)
    is_index = key.endswith(INDICES) and value.dtype in (torch.int64, torch.int32)
    return is_dense and (is_index or value.dtype in PRECISIONS)


def _converted(path: Path, file: WeightFile, published: State) -> State:
    try:
        return file.convert(published)
    except UNREADABLE as error:
        raise HyperAlignError(
            f"{path.name} does not have the published layout ({first_line(error)}). It is another model's "
            "file; get the published one."
        ) from error


def check_names(path: Path, missing: Iterable[str], extra: Iterable[str]) -> None:
    """Raises HyperAlignError if a file lacks tensors of a network or has others."""
    missing, extra = sorted(missing), sorted(extra)
    if missing or extra:
        raise HyperAlignError(
            f"{path.name} contains another model: {len(missing)} tensors are missing "
            f"({', '.join(missing[:2]) or 'none'}) and {len(extra)} are unknown "
            f"({', '.join(extra[:2]) or 'none'}). Get the published file again."
        )


def check_finite(path: Path, state: State) -> None:
    """Raises HyperAlignError if a tensor contains NaN or infinite values."""
    if bad := not_finite(state):
        raise HyperAlignError(
            f"{path.name}: {bad[0]} contains NaN or infinite values. Download or copy it again."
        )


def _check(path: Path, found: State, expected: Mapping[str, Tensor]) -> None:
    check_names(path, set(expected) - set(found), set(found) - set(expected))
    for key, value in found.items():
        if value.shape != expected[key].shape:
            raise HyperAlignError(
                f"{path.name}: {key} has shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}. "
                "It is another model's file; get the published one."
            )
    check_finite(path, found)


def _save_converted(state: State, path: Path) -> None:
    """Saves the published tensors as safetensors; only warns where the folder cannot be written to."""
    try:
        tensors = {key: _unshared(value) for key, value in state.items()}
        save_atomically(tensors, path.with_suffix(SUFFIX), {"converted_from": path.name})
    except (OSError, SafetensorError) as error:
        LOG.warning(
            "%s was not converted to safetensors (%s); the original is read instead.", path.name, error
        )


def _unshared(value: Tensor) -> Tensor:
    """Returns a tensor that shares its memory with no other; copies it only where it does."""
    whole = value.untyped_storage().nbytes() == value.nbytes
    return value.contiguous() if whole else value.clone(memory_format=torch.contiguous_format)
