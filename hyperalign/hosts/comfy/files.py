"""Folders of hypernetwork files: models/hyperalign, and the tiny hypernetworks inside the pack."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

import folder_paths

from ...checkpoint import Header, read_header
from ...conditioning import sentences
from ...errors import HyperAlignError
from ...provenance import Source
from ...tiny.weights import HYPERNETWORKS

FOLDER = "hyperalign"
MOST_NAMES = 8
"""Number of files that an error message lists."""
NONE_FOUND = "(no file in models/hyperalign)"


def register_folders() -> None:
    """Adds both folders to the host's list; only .safetensors files are offered."""
    own = Path(folder_paths.models_dir) / FOLDER
    # Settings of extra_model_paths.yaml come first and stay first.
    paths: list[str] = list(folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))[0])
    paths += [path for path in (str(own), str(HYPERNETWORKS)) if path not in paths]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})


def file_names() -> list[str]:
    """Returns the dropdown's entries; a placeholder if there is no file."""
    return folder_paths.get_filename_list(FOLDER) or [NONE_FOUND]


def file_path(name: str) -> Path:
    """Returns the path of a dropdown's entry.

    Raises:
        HyperAlignError: there is no such file; the message names the folder for it.
    """
    found = folder_paths.get_full_path(FOLDER, name)
    if found is None:
        raise HyperAlignError(_missing(name))
    return Path(found)


def _missing(name: str) -> str:
    """Returns the error message: the missing file, the available files and the folder."""
    folder, names = folder_paths.get_folder_paths(FOLDER)[0], folder_paths.get_filename_list(FOLDER)
    where = f"Put the .safetensors file into {folder} and press R to refresh the list."
    if name == NONE_FOUND:
        return f"The workflow was saved without a hypernetwork; expected one. {where}"
    # A workflow from another computer may use another subfolder or another path separator.
    if similar := [known for known in names if PureWindowsPath(known).name == PureWindowsPath(name).name]:
        return f"There is no hypernetwork {name!r}; found {', '.join(similar)}. Choose it in the widget."
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    available = ", ".join(names[:MOST_NAMES]) + more or "no file"
    return f"There is no hypernetwork {name!r}; the folders contain {available}. {where}"


def describe(header: Header) -> str:
    """Returns a summary of the header: base model, training, and data sources with their known biases."""
    schedule, network, base = header.schedule, header.network, header.base
    sizes = ", ".join(f"{key} {value}" for key, value in base.items() if key != "family")
    times = ", ".join(f"{time:.2f}" for time in schedule.key_times)
    steps, unsafe = header.training.get("steps"), header.training.get("unsafe")
    return "\n".join(
        [
            f"base: {header.family} ({sizes})",
            f"variant: {schedule.variant}" + (f" (key times {times})" if times else ""),
            f"perception: {header.mode}",
            f"layers: {len(header.targets)}, rank {network.rank}, a {network.a}, b {network.b}",
            *([f"trained: {steps} steps"] if steps else []),
            *sentences(header.training),
            *(_described(source) for source in header.sources),
            *([f"preference images: {unsafe}"] if unsafe else []),
            *(
                []
                if header.sources
                else ["reward and preference dataset: not recorded; ask the author of the file"]
            ),
        ]
    )


def _described(source: Source) -> str:
    biases = source.biases or "none recorded"
    return f"{source.kind}: {source.title} (licence: {source.licence}; known biases: {biases})"


def check_file(name: str) -> None:
    """Reads a file's header, without its tensors. Raises HyperAlignError."""
    read_header(file_path(name))
