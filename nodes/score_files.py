"""Saved images that know their scores, and a table of them beside."""

from __future__ import annotations

import csv
import io as text_io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..hyperalign.hosts.comfy.rewards import Judgement
from .drawing import to_pil

COLUMNS = ("file", "prompt", "reward", "score", "breakdown")


def save_scored(
    images_BHWC: Tensor, judgement: Judgement, prefix: str, sidecar: str, workflow: Mapping[str, Any]
) -> list[Path]:
    """Writes each image as PNG with its scores, and adds a line to the sidecar for each.

    Args:
        images_BHWC: the images, in [0, 1].
        judgement: their scores.
        prefix: of the file names, below the host's output folder; subfolders are allowed.
        sidecar: "CSV", "JSONL" or "none".
        workflow: what the host puts into its own images, by key.

    Returns:
        The images' paths.
    """
    height, width = images_BHWC.shape[1:3]
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), width, height
    )
    paths = [Path(folder) / f"{name}_{counter + index:05}_.png" for index in range(len(images_BHWC))]
    rows = [_row(judgement, index, path) for index, path in enumerate(paths)]
    for image_HWC, row, path in zip(images_BHWC, rows, paths, strict=True):
        to_pil(image_HWC).save(path, pnginfo=_metadata(row, workflow), compress_level=4)
    if sidecar != "none":
        _append(Path(folder) / f"{name}_scores.{sidecar.lower()}", rows)
    return paths


def _row(judgement: Judgement, index: int, path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "prompt": judgement.prompts[index],
        "reward": judgement.name,
        "score": judgement.scores[index],
        "breakdown": {name: scores[index] for name, scores in judgement.breakdown.items()},
    }


def _metadata(row: Mapping[str, Any], workflow: Mapping[str, Any]) -> PngInfo:
    info = PngInfo()
    for key, value in workflow.items():
        info.add_text(key, json.dumps(value))
    for key in COLUMNS[1:]:
        info.add_text(f"hyperalign_{key}", _text(row[key]))
    return info


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds whole lines in one write, so that an interruption leaves no half of one."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        buffer = text_io.StringIO()
        writer = csv.writer(buffer)
        if not path.exists():
            writer.writerow(COLUMNS)
        writer.writerows([_text(row[key]) for key in COLUMNS] for row in rows)
        text = buffer.getvalue()
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
