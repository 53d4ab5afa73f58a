"""Scores the demo's images with the tiny model's evaluators and writes the report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hyperalign.files import write_text
from hyperalign.tiny.evaluators import (
    load_detector,
    load_reward,
    load_style_classifier,
    load_validation_reward,
)
from hyperalign.tiny.geneval import diversity, is_correct, summarise
from hyperalign.tiny.text_encoder import tokenize_batch
from scripts.common import say
from scripts.generation import METHODS, SEEDS, Demo, GeneratedImage


@dataclass(frozen=True)
class Scored:
    """An image with every evaluator's result; `embedding_D` is the validation reward's embedding of it."""

    image: GeneratedImage
    reward: float
    validation_reward: float
    style: float
    correct: bool
    embedding_D: Tensor


def read_images(paths: Sequence[Path]) -> Tensor:
    """Returns the images as (B, 3, H, W) in [0, 1]."""
    arrays = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255.0 for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def measure(images: Sequence[GeneratedImage]) -> list[Scored]:
    """Returns every image with its scores, in the order given."""
    images_BCHW = read_images([image.path for image in images])
    tokens_BL = tokenize_batch([image.request.prompt for image in images])
    validation = load_validation_reward()
    rewards = load_reward()(images_BCHW, tokens_BL).tolist()
    validation_rewards = validation(images_BCHW, tokens_BL).tolist()
    styles = load_style_classifier()(images_BCHW).tolist()
    found = load_detector().detect(images_BCHW)
    correct = [is_correct(p.request.content, f) for p, f in zip(images, found, strict=True)]
    embeddings_BD = validation.embed_images(images_BCHW)
    columns = (images, rewards, validation_rewards, styles, correct, embeddings_BD)
    return [Scored(*row) for row in zip(*columns, strict=True)]


def write_report(demo: Demo, scored: Sequence[Scored], path: Path) -> dict[str, Any]:
    """Writes report.json and returns its content."""
    report = {
        "host": demo.host,
        "prompts": len({s.image.request.prompt for s in scored}),
        "seeds": list(SEEDS),
        "steps": demo.steps,
        "cfg": demo.cfg,
        "methods": {m: _metrics([s for s in scored if s.image.method == m]) for m in METHODS},
    }
    write_text(path, json.dumps(report, indent=2) + "\n")
    return report


def _metrics(scored: Sequence[Scored]) -> dict[str, Any]:
    by_prompt: dict[str, list[Tensor]] = {}
    for s in scored:
        by_prompt.setdefault(s.image.request.prompt, []).append(s.embedding_D)
    embeddings_PSD = torch.stack([torch.stack(seeds) for seeds in by_prompt.values()])
    geneval = summarise((s.image.request.content.family, s.correct) for s in scored)
    return {
        "reward": _mean(s.reward for s in scored),
        "validation_reward": _mean(s.validation_reward for s in scored),
        "geneval": {name: round(share, 4) for name, share in geneval.items()},
        "style": _mean(s.style for s in scored),
        "diversity": round(float(diversity(embeddings_PSD).mean()), 4),
        # The median: the first run also loads the models.
        "seconds_per_image": round(statistics.median(s.image.seconds for s in scored), 3),
        "generations_per_run": _mean(s.image.generations for s in scored),
    }


def _mean(values: Any) -> float:
    return round(statistics.fmean(values), 4)


def print_table(report: dict[str, Any]) -> None:
    """Prints the report's metrics, one method a line."""
    titles = ("", "reward", "validation", "geneval", "style", "diversity", "s/image", "generations")
    rows: list[tuple[str, ...]] = [titles]
    for method, metrics in report["methods"].items():
        numbers = (
            metrics["reward"], metrics["validation_reward"], metrics["geneval"]["overall"], metrics["style"],
            metrics["diversity"], metrics["seconds_per_image"],
        )  # fmt: skip
        rows.append((method, *(f"{n:.3f}" for n in numbers), f"{metrics['generations_per_run']:g}"))
    host = report["host"]
    runs = f"{report['prompts']} prompts x {len(report['seeds'])} seeds, {report['steps']} steps"
    software = f"ComfyUI {host['comfyui']}, torch {host['torch']}, {host['device']}"
    say(f"\n{runs}, CFG {report['cfg']:g}; {software}")
    for row in rows:
        say(f"{row[0]:14s}" + "".join(f"{cell:>12s}" for cell in row[1:]))
