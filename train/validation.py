"""Validation during training: images of validation prompts, their scores, and a captioned grid of them."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hyperalign.checkpoint import HyperAlign
from hyperalign.files import replacing
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.rewards import Reward
from hyperalign.tiny.geneval import diversity
from train.analysis.conditioning import Judge, Setting, conditioning, identity
from train.config import TrainConfig
from train.evaluation.table import Numbers
from train.log import Metrics
from train.models.base import Base, PromptEncoder
from train.models.image_embedding import Embed, diversity_embedding
from train.models.tiny import Tiny
from train.processes import mean_number, mean_tensor
from train.sampling import BATCH, SampledImages, Sampler, sample
from train.tiny.evaluate import judged, means_and_spread, metrics, sample_all

VALIDATION_SEEDS = (0, 1)
"""Seeds of each validation prompt; diversity compares the two images."""
GRID_ROWS, GRID_COLUMNS = 4, 6
GRID_SIDE, GRID_SCALE = 256, 2
"""Pixels of an image in the grid: enlarged by the scale, but no larger than the side."""
CAPTION_HEIGHT, CAPTION_LINE, CAPTION_LETTERS = 26, 12, 24


class Validate(Protocol):
    """Samples validation prompts, writes an image grid and returns the metrics."""

    def __call__(self, hyperalign: HyperAlign | None, grid: Path, is_last: bool = False) -> Metrics:
        """Every process calls it; only the main one's metrics count.

        Args:
            hyperalign: what is validated; None for the base model.
            grid: where the image grid goes.
            is_last: also measures what the conditioning is worth, which takes as long as five validations.
        """
        ...


def reward_validation(
    config: TrainConfig,
    base: Base,
    encoder: PromptEncoder,
    rewards: Mapping[str, Reward],
    prompts: Sequence[str],
    accelerator: Accelerator,
) -> Validate:
    """Returns the validation that samples every prompt at two seeds and scores the images by every reward.

    The figures are those of all prompts in any number of processes. `encoder` gives a prompt's conditions
    whatever the others in its batch are.

    Raises:
        HyperAlignError: validation.diversity_encoder is not a whole DINOv2.
    """
    embed = diversity_embedding(config, rewards, base.device)
    own = share_of_prompts(len(prompts), accelerator.process_index, accelerator.num_processes)

    def whole(values: Tensor) -> Tensor:
        return in_order(values, len(prompts), accelerator)

    judge = rewards_judge(rewards, config, base.device, whole)

    def validate(hyperalign: HyperAlign | None, grid: Path, is_last: bool = False) -> Metrics:
        own_prompts, scale = [prompts[index] for index in own], config.objective.guidance_scale
        batch = config.objective.images_at_once or config.objective.prompt_batch
        images = sample(
            base, encoder, hyperalign, own_prompts, indices=own, seeds=VALIDATION_SEEDS,
            steps=config.validation.steps, guidance_scale=scale, batch=batch,
        )  # fmt: skip
        scores_PS = {name: whole(found) for name, found in image_scores(images, rewards, base.device).items()}
        shown = dataclasses.replace(images, prompts=list(prompts), images=whole(images.images[:, :1]))
        if accelerator.is_main_process:
            save_grid(shown, grid)
        metrics: Metrics = means_and_spread(scores_PS)
        if embed is not None:
            metrics["diversity"] = float(whole(image_diversity(images.images, embed)).mean())
        metrics["not_finite"] = 1.0 - float(whole(images.finite.float()).mean())
        metrics["seconds_per_image"] = mean_number(images.seconds_per_image, accelerator)
        metrics["generations_per_run"] = images.generations_per_run
        if hyperalign is not None:
            adapter = Adapter(base.backbone, hyperalign)
            sampler = Sampler(base, encoder, adapter, config.validation.steps, scale)
            setting = Setting(
                sampler, own_prompts, VALIDATION_SEEDS, batch, indices=own,
                shared=lambda values: mean_tensor(values, accelerator),
            )  # fmt: skip
            metrics |= conditioning(setting, judge, {}, is_last)
        return metrics

    return validate


def rewards_judge(
    rewards: Mapping[str, Reward],
    config: TrainConfig,
    device: torch.device,
    whole: Callable[[Tensor], Tensor] = identity,
) -> Judge:
    """Returns what scores images by the rewards that no loss optimises, or by all if there is no other.

    `whole` gathers the prompts of all processes.
    """
    measured = {name: reward for name, reward in rewards.items() if name not in config.objective.optimised}

    def judge(images: SampledImages) -> dict[str, Numbers]:
        found = image_scores(images, measured or rewards, device)
        return {name: whole(scores_PS).double().mean(dim=1).numpy() for name, scores_PS in found.items()}

    return judge


def tiny_validation(config: TrainConfig, base: Tiny, is_main: bool) -> Validate:
    """Returns the embedded model's validation: its own prompts, scored by its own evaluators."""

    def validate(hyperalign: HyperAlign | None, grid: Path, is_last: bool = False) -> Metrics:
        if not is_main:
            return {}
        steps, scale = config.validation.steps, config.objective.guidance_scale
        images = sample_all(
            base, hyperalign, config.validation.prompt_count, seeds=VALIDATION_SEEDS,
            steps=steps, guidance_scale=scale, bf16=config.optim.bf16, wordings=config.data.wordings,
        )  # fmt: skip
        save_grid(images, grid)
        found = metrics(images)
        if hyperalign is not None:
            adapter = Adapter(base.backbone, hyperalign)
            sampler = Sampler(base, base, adapter, steps, scale, bf16=config.optim.bf16)
            setting = Setting(sampler, images.prompts, VALIDATION_SEEDS, BATCH)
            found |= conditioning(setting, *judged(images.contents), is_last)
        return found

    return validate


def share_of_prompts(count: int, process: int, processes: int) -> list[int]:
    """Returns the indices of the prompts of one process: every n-th, as many as every other process has.

    A sharded backbone needs as many forwards in each process, so where the prompts do not divide evenly some
    processes repeat one, whose scores `in_order` drops.
    """
    each = -(-count // processes)
    return [(place * processes + process) % count for place in range(each)]


def in_order(values: Tensor, count: int, accelerator: Accelerator) -> Tensor:
    """Gathers the rows of all processes' prompts in the order of the prompts, each once, on the CPU."""
    gathered: Any = accelerator.gather(values.to(accelerator.device))
    rows: Tensor = gathered.unflatten(0, (accelerator.num_processes, -1))
    return rows.transpose(0, 1).flatten(0, 1)[:count].cpu()


@torch.no_grad()
def image_scores(
    images: SampledImages, rewards: Mapping[str, Reward], device: torch.device
) -> dict[str, Tensor]:
    """Returns each reward's scores (P, S)."""

    def scores(reward: Reward) -> Tensor:
        rows = [
            reward.score(row_S3HW[index : index + 1].to(device), [prompt])
            for prompt, row_S3HW in zip(images.prompts, images.images, strict=True)
            for index in range(len(row_S3HW))
        ]
        return torch.cat(rows).view(images.images.shape[:2])

    return {name: scores(reward) for name, reward in rewards.items()}


@torch.no_grad()
def image_diversity(images_PS3HW: Tensor, embed: Embed) -> Tensor:
    """Returns the mean cosine distance of each prompt's images over its seeds, (P,)."""
    flat = images_PS3HW.flatten(0, 1)
    embeddings = torch.cat([embed(flat[index : index + 1]) for index in range(len(flat))])
    return diversity(embeddings.unflatten(0, images_PS3HW.shape[:2]))


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
