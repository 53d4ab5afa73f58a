"""GenEval's scorer: detector, colours and rules combined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..rewards import download, loading
from ..rewards.clip import ClipReward
from ..rewards.images import rgb
from ..rewards.weights import find
from . import detector
from .colors import ColorClassifier
from .prompts import Prompt
from .rules import Detection, Evaluation, evaluate, select

CLIP = "clip"
"""The reward whose network classifies colours."""


@dataclass(frozen=True, slots=True)
class GenEval:
    """Evaluates images by their detected objects."""

    detector: nn.Module
    classifier: ColorClassifier

    def evaluate(self, image_CHW: Tensor, prompt: Prompt) -> tuple[Evaluation, dict[str, list[Detection]]]:
        """Evaluates an image (1, 3 or 4, H, W) in [0, 1]; also returns the selected detections by class.

        Raises HyperAlignError on an image of another form.
        """
        selected = select(detector.detect(self.detector, image_CHW), prompt.tag)
        image_CHW = rgb(image_CHW[None])[0].float()
        colored: dict[str, list[Detection]] = {name: list(group) for name, group in selected.items()}
        for required in prompt.include:
            group = selected.get(required.name, [])[: required.count]
            if required.color is not None and len(group) == required.count:
                colors = self.classifier.colors(image_CHW, group)
                colored[required.name][: required.count] = [
                    replace(item, color=color) for item, color in zip(group, colors, strict=True)
                ]
        return evaluate(prompt, colored), colored


def provide(folder: Path, tokenizer_folder: Path | None, download_missing: bool) -> list[Path]:
    """Downloads missing weight files if asked to; returns their paths and reads none of the large ones.

    Raises HyperAlignError unless all files are present then.
    """
    if download_missing:
        download.download_file(detector.WEIGHTS.url, folder / detector.WEIGHTS.path)
    return [
        find(detector.WEIGHTS, folder),
        *download.provide(CLIP, folder, tokenizer_folder, download_missing),
    ]


def load(
    folder: Path, *, device: torch.device | str = "cpu", tokenizer_folder: Path | None = None
) -> GenEval:
    """Loads both networks, frozen, in float32. Nothing is downloaded.

    Args:
        folder: of the rewards' weights, as for `loading.load`.
        device: of the networks.
        tokenizer_folder: of CLIP's vocabulary, if not that of the weights.

    Raises:
        HyperAlignError: a file is missing, damaged or another model's.
    """
    clip = loading.load(CLIP, folder, device=device, tokenizer_folder=tokenizer_folder)
    return GenEval(detector.load(folder, device), ColorClassifier(cast(ClipReward, clip)))
