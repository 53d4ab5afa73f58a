"""Folders of reward model weights: models/hyperalign_rewards, and CLIP's vocabulary in the host."""

from __future__ import annotations

import itertools
import logging
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.sd1_clip
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from ...errors import HyperAlignError
from ...rewards import download, loading
from ...rewards.ensemble import Calibration, calibrate, load_calibrations, save_calibrations
from ...rewards.loading import PUBLISHED
from ...rewards.weights import present
from .rewards import BatchScores, HostReward, hosted

LOG = logging.getLogger(__name__)
FOLDER = "hyperalign_rewards"
CALIBRATIONS = "calibrations.json"

_LOADED: dict[str, tuple[list[tuple[int, int]], HostReward]] = {}
"""The loaded reward of each name with its file states, because a node runs again when its weight widget
changes. A reward that the host unloads, to free memory, is removed."""


def register_folder() -> None:
    """Adds models/hyperalign_rewards to the host's folders, after those of extra_model_paths.yaml."""
    own = str(Path(folder_paths.models_dir) / FOLDER)
    paths: list[str] = list(folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))[0])
    paths += [path for path in (own,) if path not in paths]
    suffixes = {".safetensors", ".pt", ".pth", ".bin"}
    folder_paths.folder_names_and_paths[FOLDER] = (paths, suffixes)


def load(name: str, *, fetch: bool = False) -> HostReward:
    """Loads one of `loading.NAMES`, in half precision if the device supports it well.

    A reward that is already loaded is returned again, unless its files have changed or the host unloaded it.

    Args:
        name: one of `loading.NAMES`.
        fetch: download missing files first, with the host's progress bar.

    Raises:
        HyperAlignError: a file is missing, damaged or contains code; or there is no network.
    """
    if (missing := problem(name)) is not None:
        if not fetch:
            raise HyperAlignError(missing)
        download.download(name, _folder(name), _progress())
    if name in _LOADED and _LOADED[name][0] == file_states(name):
        return _LOADED[name][1]
    half = comfy.model_management.should_use_fp16(comfy.model_management.get_torch_device())
    dtype = torch.float16 if half else torch.float32
    reward = loading.load(name, _folder(name), dtype=dtype, tokenizer_folder=_host_vocabulary())
    found = hosted(reward)
    found.patchers[0].add_callback(CallbacksMP.ON_DETACH, partial(_forget, name))
    _LOADED[name] = file_states(name), found  # only now, because loading converts a published .pt
    return found


def problem(name: str) -> str | None:
    """Returns which file of a reward is missing, its size, source page and folder; or None."""
    if name not in PUBLISHED:
        return None
    try:
        loading.check_files(name, _folder(name), _host_vocabulary())
    except HyperAlignError as error:
        return f"{error} Or turn on download in Reward Model Loader."
    return None


def file_states(name: str) -> list[tuple[int, int]]:
    """Returns modification time in nanoseconds and size in bytes of a reward's files that exist."""
    files, folder = PUBLISHED[name].files if name in PUBLISHED else (), _folder(name)
    found = [path.stat() for file in files if (path := present(file, folder)) is not None]
    return [(status.st_mtime_ns, status.st_size) for status in found]


def calibrations() -> dict[str, Calibration]:
    """Returns the stored calibrations by reward name; none if there is no file. Raises HyperAlignError."""
    path = _own_folder() / CALIBRATIONS
    return load_calibrations(path) if path.is_file() else {}


def calibrated_at() -> float:
    """Returns when calibrations were last stored, in seconds since 1970; 0 if never."""
    path = _own_folder() / CALIBRATIONS
    return path.stat().st_mtime if path.is_file() else 0.0


def store_calibrations(batch: BatchScores) -> None:
    """Stores each reward's mean and standard deviation over these images, for z-scores.

    A damaged file is replaced: calibrating is the way to repair it.

    Raises HyperAlignError on fewer than two images or equal scores.
    """
    found = {name: calibrate(torch.tensor(scores)) for name, scores in batch.breakdown.items()}
    folder = _own_folder()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        before = calibrations()
    except HyperAlignError as error:
        LOG.warning("%s The file is replaced by one with %s only.", error, ", ".join(found))
        before = {}
    save_calibrations(folder / CALIBRATIONS, before | found)


def _forget(name: str, patcher: ModelPatcher, *_: object) -> None:
    """Removes a reward that the host unloads.

    The host still needs the patcher at that moment, so its own record keeps the reward alive until the host
    drops the record.
    """
    entry = _LOADED.pop(name, None)
    for record in comfy.model_management.current_loaded_models:
        if record.model is patcher:
            record.hyperalign_reward = entry


def _own_folder() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def _folder(name: str) -> Path:
    """Returns the first folder that has all files of a reward, else the first folder."""
    files = PUBLISHED[name].files if name in PUBLISHED else ()
    for folder in map(Path, folder_paths.get_folder_paths(FOLDER)):
        if all(present(file, folder) for file in files):
            return folder
    return _own_folder()


def _host_vocabulary() -> Path:
    return Path(str(comfy.sd1_clip.__file__)).parent / "sd1_tokenizer"


def _progress() -> download.Progress:
    """Returns a callback that moves the host's progress bar and stops the download when the user cancels."""
    bar = comfy.utils.ProgressBar(1)
    blocks = itertools.count()

    def show(_name: str, here: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if next(blocks) % 8 == 0 or here == total:
            bar.update_absolute(here, total)

    return show
