"""Validation during training: images of validation prompts, their scores, and a captioned grid of them."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from hyperalign.checkpoint import HyperAlign
from hyperalign.files import replacing
from hyperalign.rewards import Reward
from train.config import TrainConfig
from train.log import Metrics
from train.models.base import Base, PromptEncoder
from train.models.tiny import Tiny
from train.sampling import SampledImages, sample
from train.tiny.evaluate import metrics, sample_all

Validate = Callable[[HyperAlign, Path], Metrics]
"""Samples validation prompts, writes an image grid to the path and returns the metrics.

Every process calls it; only the main one's metrics count."""

VALIDATION_SEEDS = (0, 1)
"""Seeds of each validation prompt; diversity compares the two images."""
GRID_ROWS, GRID_COLUMNS = 4, 6
GRID_SIDE, GRID_SCALE = 256, 2
"""Pixels of an image in the grid: enlarged by the scale, but no larger than the side."""
CAPTION_HEIGHT, CAPTION_LINE, CAPTION_LETTERS = 26, 12, 24


def reward_validation(
    config: TrainConfig,
    base: Base,
    encoder: PromptEncoder,
    rewards: Mapping[str, Reward],
    prompts: Sequence[str],
    accelerator: Accelerator,
) -> Validate:
    """Returns the validation that samples every prompt at two seeds and scores the images by every reward.

    Each process takes its share of the prompts, as many as the others.
    """
    processes = accelerator.num_processes
    own = range(accelerator.process_index, len(prompts), processes)[: max(1, len(prompts) // processes)]

    def validate(hyperalign: HyperAlign, grid: Path) -> Metrics:
        batch = config.objective.micro_batch or config.objective.prompt_batch
        images = sample(
            base, encoder, hyperalign, [prompts[index] for index in own], indices=own,
            seeds=VALIDATION_SEEDS, steps=config.validation.steps,
            guidance_scale=config.objective.guidance_scale, batch=batch,
        )  # fmt: skip
        scores = mean_scores(images, rewards, base.device)
        save_shared_grid(images, grid, accelerator)
        means = {
            name: _gathered(torch.tensor([value], device=base.device), accelerator).mean().item()
            for name, value in scores.items()
        }
        return means | {"generations_per_run": images.generations_per_run}

    return validate


def tiny_validation(config: TrainConfig, base: Tiny, is_main: bool) -> Validate:
    """Returns the embedded model's validation: its own prompts, scored by its own evaluators."""

    def validate(hyperalign: HyperAlign, grid: Path) -> Metrics:
        if not is_main:
            return {}
        images = sample_all(
            base, hyperalign, config.validation.prompt_count, seeds=(0,), steps=config.validation.steps,
            guidance_scale=config.objective.guidance_scale, bf16=config.optim.bf16,
        )  # fmt: skip
        save_grid(images, grid)
        return metrics(images)

    return validate


def mean_scores(
    images: SampledImages, rewards: Mapping[str, Reward], device: torch.device
) -> dict[str, float]:
    """Returns each reward's mean, the diversity in the first one's embeddings, and seconds per image."""
    seeds = images.images.shape[1]
    jobs = [
        (prompt, image) for prompt, row in zip(images.prompts, images.images, strict=True) for image in row
    ]
    means = {"seconds_per_image": images.seconds_per_image, "not_finite": images.not_finite}
    with torch.no_grad():
        for name, reward in rewards.items():
            scores = [reward.score(image[None].to(device), [prompt]) for prompt, image in jobs]
            means[name] = float(torch.cat(scores).mean())
        first = next(iter(rewards.values()))
        embeddings = torch.cat([first.embed_images(image[None].to(device)) for _, image in jobs])
    return means | {"diversity": diversity(embeddings.unflatten(0, (len(images.prompts), seeds)))}


def diversity(embeddings_PSD: Tensor) -> float:
    """Returns the mean cosine distance between the first two seeds' images of each prompt."""
    first, second = F.normalize(embeddings_PSD.float(), dim=-1)[:, :2].unbind(dim=1)
    return float((1.0 - (first * second).sum(dim=-1)).mean())


def save_shared_grid(images: SampledImages, path: Path, accelerator: Accelerator) -> None:
    """Writes one image of every prompt of all processes."""
    first = _gathered(images.images[:, :1].to(accelerator.device), accelerator).cpu()
    prompts: list[str] = gather_object(images.prompts)
    if accelerator.is_main_process:
        save_grid(dataclasses.replace(images, prompts=prompts, images=first), path)


def save_grid(samples: SampledImages, path: Path, rows: int = GRID_ROWS) -> None:
    """Writes one captioned PNG with the first image of each prompt."""
    count = min(len(samples.prompts), rows * GRID_COLUMNS)
    side = min(GRID_SIDE, samples.images.shape[-1] * GRID_SCALE)
    cell = side + CAPTION_HEIGHT
    sheet = Image.new("RGB", (GRID_COLUMNS * side, -(-count // GRID_COLUMNS) * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for index in range(count):
        pixels = (samples.images[index, 0] * 255).round().byte().permute(1, 2, 0).numpy()
        x, y = index % GRID_COLUMNS * side, index // GRID_COLUMNS * cell
        image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(image, (x, y + CAPTION_HEIGHT))
        for line, text in enumerate(_wrapped(samples.prompts[index])):
            draw.text((x + 2, y + 1 + CAPTION_LINE * line), text, fill="black", font=font)
    with replacing(path) as partial:
        sheet.save(partial, "PNG")


def _wrapped(text: str) -> list[str]:
    """Returns the first two lines of a caption."""
    lines = textwrap.wrap(text, CAPTION_LETTERS, break_long_words=False, break_on_hyphens=False)
    return lines[:2]


def _gathered(values: Tensor, accelerator: Accelerator) -> Tensor:
    gathered: Any = accelerator.gather(values)
    return gathered
