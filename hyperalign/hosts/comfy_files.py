"""Where the host finds hypernetwork files: models/hyperalign, and the tiny ones inside the pack."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..checkpoint import Header, read_header
from ..errors import HyperAlignError
from ..tiny.weights import HYPERNETWORKS

FOLDER = "hyperalign"
NONE_FOUND = "(no file in models/hyperalign)"


def register_folders() -> None:
    """Adds both folders to the host's list; only .safetensors files are offered."""
    own = Path(folder_paths.models_dir) / FOLDER
    # Settings of extra_model_paths.yaml come first and stay first.
    paths: list[str] = list(folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))[0])
    paths += [path for path in (str(own), str(HYPERNETWORKS)) if path not in paths]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})


def file_names() -> list[str]:
    """Returns the dropdown's entries, never none."""
    return folder_paths.get_filename_list(FOLDER) or [NONE_FOUND]


def file_path(name: str) -> Path:
    """Returns the path of a dropdown's entry.

    Raises:
        HyperAlignError: there is no such file; the message says where to put one.
    """
    found = folder_paths.get_full_path(FOLDER, name)
    if found is None:
        folder = folder_paths.get_folder_paths(FOLDER)[0]
        have = ", ".join(folder_paths.get_filename_list(FOLDER)) or "no file"
        raise HyperAlignError(
            f"There is no hypernetwork {name!r}; the folders hold {have}. "
            f"Put the .safetensors file into {folder} and press R to refresh the list."
        )
    return Path(found)


def describe(header: Header) -> str:
    """Returns the header in a few lines."""
    schedule, network, base = header.schedule, header.network, header.base
    sizes = ", ".join(f"{key} {value}" for key, value in base.items() if key != "family")
    times = ", ".join(f"{time:.2f}" for time in schedule.key_times)
    training = [f"{key}: {value}" for key, value in header.training.items()]
    return "\n".join(
        [
            f"base: {header.family} ({sizes})",
            f"variant: {schedule.variant}" + (f" (key times {times})" if times else ""),
            f"perception: {header.mode}",
            f"layers: {len(header.targets)}, rank {network.rank}, a {network.a}, b {network.b}",
            *training,
        ]
    )


def check_file(name: str) -> None:
    """Reads a file's header without a tensor. Raises HyperAlignError."""
    read_header(file_path(name))
