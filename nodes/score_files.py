"""Saving images with their scores in the metadata, and a table of scores next to them."""

from __future__ import annotations

import csv
import io as text_io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..hyperalign.hosts.comfy.rewards import BatchScores
from .drawing import to_pil

COLUMNS = ("file", "prompt", "reward", "score", "breakdown")


def save_scored(
    images_HWC: Sequence[Tensor], batch: BatchScores, prefix: str, sidecar: str, workflow: Mapping[str, Any]
) -> list[Path]:
    """Saves each image as PNG with its scores, and adds a line per image to the sidecar.

    Args:
        images_HWC: the images, in [0, 1].
        batch: their scores.
        prefix: prefix of the file names in the host's output folder; may contain subfolders.
        sidecar: "CSV", "JSONL" or "none".
        workflow: metadata that the host stores in its own images, by key.

    Returns:
        The images' paths.
    """
    height, width = images_HWC[0].shape[:2]
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), width, height
    )
    paths = [Path(folder) / f"{name}_{counter + index:05}_.png" for index in range(len(images_HWC))]
    rows = [_row(batch, index, path) for index, path in enumerate(paths)]
    for image_HWC, row, path in zip(images_HWC, rows, paths, strict=True):
        to_pil(image_HWC).save(path, pnginfo=_metadata(row, workflow), compress_level=4)
    if sidecar != "none":
        _append(Path(folder) / f"{name}_scores.{sidecar.lower()}", rows)
    return paths


def _row(batch: BatchScores, index: int, path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "prompt": batch.prompts[index],
        "reward": batch.name,
        "score": batch.scores[index],
        "breakdown": {name: scores[index] for name, scores in batch.breakdown.items()},
    }


def _metadata(row: Mapping[str, Any], workflow: Mapping[str, Any]) -> PngInfo:
    info = PngInfo()
    for key, value in workflow.items():
        info.add_text(key, json.dumps(value))
    for key in COLUMNS[1:]:
        info.add_text(f"hyperalign_{key}", _text(row[key]))
    return info


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends all lines in one write, so that an interruption leaves no partial line."""
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
