"""GenEval's scorer: detector, colours and rules together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..rewards import loading
from ..rewards.clip import ClipReward
from ..rewards.images import rgb
from . import detector
from .colors import ColorClassifier
from .prompts import Prompt
from .rules import Detection, Verdict, judge, kept

CLIP = "clip"
"""The colours' CLIP is the CLIP score's."""


@dataclass(frozen=True, slots=True)
class GenEval:
    """Judges images by what is in them."""

    detector: nn.Module
    classifier: ColorClassifier

    def judge(self, image_CHW: Tensor, prompt: Prompt) -> tuple[Verdict, dict[str, list[Detection]]]:
        """Returns the verdict on an image (1, 3 or 4, H, W) in [0, 1], and what counted, by class.

        Raises HyperAlignError on an image of another form.
        """
        found = kept(detector.detect(self.detector, image_CHW), prompt.tag)
        image_CHW = rgb(image_CHW[None])[0].float()
        colored: dict[str, list[Detection]] = {name: list(group) for name, group in found.items()}
        for asked in prompt.include:
            group = found.get(asked.name, [])[: asked.count]
            if asked.color is not None and len(group) == asked.count:
                colors = self.classifier.colors(image_CHW, group)
                colored[asked.name][: asked.count] = [
                    replace(one, color=color) for one, color in zip(group, colors, strict=True)
                ]
        return judge(prompt, colored), colored


def load(
    folder: Path, *, device: torch.device | str = "cpu", tokenizer_folder: Path | None = None
) -> GenEval:
    """Loads both networks, frozen, in float32. Nothing is downloaded.

    Args:
        folder: where the rewards' weights lie, as for `loading.load`.
        device: where the networks go.
        tokenizer_folder: where CLIP's vocabulary lies, if not with the weights.

    Raises:
        HyperAlignError: a file is missing, damaged or another model's.
    """
    clip = loading.load(CLIP, folder, device=device, tokenizer_folder=tokenizer_folder)
    return GenEval(detector.load(folder, device), ColorClassifier(cast(ClipReward, clip)))
