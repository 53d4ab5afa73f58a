"""Judges the demo's pictures with the embedded world's judges and writes the report."""

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

from hyperalign.tiny.evaluators import load_detector, load_heldout_reward, load_reward, load_style_classifier
from hyperalign.tiny.geneval import diversity, is_correct, summarise
from hyperalign.tiny.text_encoder import tokenize_batch
from scripts.common import say
from scripts.drawing import METHODS, SEEDS, Drawing, Picture


@dataclass(frozen=True)
class Scored:
    """A picture with every judge's word; `embedding_D` is the held-out reward's view of it."""

    picture: Picture
    reward: float
    heldout_reward: float
    style: float
    correct: bool
    embedding_D: Tensor


def read_images(paths: Sequence[Path]) -> Tensor:
    """Returns the pictures as (B, 3, H, W) in [0, 1]."""
    arrays = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255.0 for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def measure(pictures: Sequence[Picture]) -> list[Scored]:
    """Returns every picture with its scores, in the order given."""
    images_BCHW = read_images([picture.path for picture in pictures])
    tokens_BL = tokenize_batch([picture.request.prompt for picture in pictures])
    heldout = load_heldout_reward()
    rewards = load_reward()(images_BCHW, tokens_BL).tolist()
    heldout_rewards = heldout(images_BCHW, tokens_BL).tolist()
    styles = load_style_classifier()(images_BCHW).tolist()
    found = load_detector().detect(images_BCHW)
    correct = [is_correct(p.request.content, f) for p, f in zip(pictures, found, strict=True)]
    embeddings_BD = heldout.embed_images(images_BCHW)
    columns = (pictures, rewards, heldout_rewards, styles, correct, embeddings_BD)
    return [Scored(*row) for row in zip(*columns, strict=True)]


def write_report(drawing: Drawing, scored: Sequence[Scored], path: Path) -> dict[str, Any]:
    """Writes report.json and returns what it says."""
    report = {
        "host": drawing.host,
        "prompts": len({s.picture.request.prompt for s in scored}),
        "seeds": list(SEEDS),
        "steps": drawing.steps,
        "cfg": drawing.cfg,
        "methods": {m: _figures([s for s in scored if s.picture.method == m]) for m in METHODS},
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _figures(scored: Sequence[Scored]) -> dict[str, Any]:
    by_prompt: dict[str, list[Tensor]] = {}
    for s in scored:
        by_prompt.setdefault(s.picture.request.prompt, []).append(s.embedding_D)
    embeddings_PSD = torch.stack([torch.stack(seeds) for seeds in by_prompt.values()])
    geneval = summarise((s.picture.request.content.family, s.correct) for s in scored)
    return {
        "reward": _mean(s.reward for s in scored),
        "heldout_reward": _mean(s.heldout_reward for s in scored),
        "geneval": {name: round(share, 4) for name, share in geneval.items()},
        "style": _mean(s.style for s in scored),
        "diversity": round(float(diversity(embeddings_PSD).mean()), 4),
        # The median: the first run also loads the models.
        "seconds_per_image": round(statistics.median(s.picture.seconds for s in scored), 3),
        "generations_per_run": _mean(s.picture.generations for s in scored),
    }


def _mean(values: Any) -> float:
    return round(statistics.fmean(values), 4)


def print_table(report: dict[str, Any]) -> None:
    """Prints the report's figures, one method a line."""
    titles = ("", "reward", "held-out", "geneval", "style", "diversity", "s/image", "generations")
    rows: list[tuple[str, ...]] = [titles]
    for method, figures in report["methods"].items():
        numbers = (
            figures["reward"], figures["heldout_reward"], figures["geneval"]["overall"], figures["style"],
            figures["diversity"], figures["seconds_per_image"],
        )  # fmt: skip
        rows.append((method, *(f"{n:.3f}" for n in numbers), f"{figures['generations_per_run']:g}"))
    host = report["host"]
    drawn = f"{report['prompts']} prompts x {len(report['seeds'])} seeds, {report['steps']} steps"
    software = f"ComfyUI {host['comfyui']}, torch {host['torch']}, {host['device']}"
    say(f"\n{drawn}, CFG {report['cfg']:g}; {software}")
    for row in rows:
        say(f"{row[0]:14s}" + "".join(f"{cell:>12s}" for cell in row[1:]))
