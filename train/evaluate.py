"""Held-out prompts, sampled and judged: the figures during training and in the benchmark."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperalign.checkpoint import HyperAlign
from hyperalign.hosts.diffusers import Adapter
from hyperalign.hosts.diffusers_tiny import TinyBase
from hyperalign.schedule import Schedule
from hyperalign.tiny.geneval import diversity, is_correct, summarise
from hyperalign.tiny.judges import load_detector, load_heldout_reward, load_reward, load_style_classifier
from hyperalign.tiny.prompts import Content, Family
from hyperalign.tiny.text_encoder import tokenize_batch
from train.data import heldout_prompts
from train.rollout import rollout

PROMPT_SEED = 2601
BATCH = 32


@dataclass(frozen=True, slots=True)
class Samples:
    """Pictures of P prompts at S seeds."""

    prompts: list[str]
    contents: list[Content]
    images: Tensor
    """(P, S, 3, 64, 64) in [0, 1]."""
    seconds_per_image: float
    generations_per_run: int


@dataclass(frozen=True, slots=True)
class Judged:
    """Every figure of every picture, (P, S); diversity is per prompt, (P,)."""

    reward: Tensor
    heldout_reward: Tensor
    correct: Tensor
    style: Tensor
    diversity: Tensor


def initial_noise(prompt_index: int, seed: int, shape: tuple[int, int, int] = (4, 16, 16)) -> Tensor:
    """Returns the noise of one picture; it depends on its prompt's place and its seed alone."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + prompt_index)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def sample_all(
    base: TinyBase,
    hyperalign: HyperAlign | None,
    count: int,
    *,
    seeds: tuple[int, ...],
    steps: int,
    guidance: float,
    strength: float = 1.0,
    bf16: bool = False,
) -> Samples:
    """Samples `count` held-out prompts at every seed; None is the base model."""
    chosen = heldout_prompts(count, PROMPT_SEED)
    jobs = [(index, seed) for index in range(count) for seed in seeds]
    adapter = Adapter(base.unet, hyperalign) if hyperalign else None
    schedule = hyperalign.header.schedule if hyperalign else Schedule("I")
    images: list[Tensor] = []
    generations = 0
    started = time.monotonic()
    for first in range(0, len(jobs), BATCH):
        chunk = jobs[first : first + BATCH]
        prompts = [chosen[index][0] for index, _ in chunk]
        context = base.encode_prompts(prompts + [""] * len(chunk))
        noise = torch.stack([initial_noise(*job) for job in chunk]).to(base.device)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=bf16):
            path = rollout(
                base.unet,
                adapter,
                schedule,
                context,
                noise,
                steps=steps,
                guidance=guidance,
                strength=strength,
            )
            images.append(base.decode(path.final).float().clamp(0.0, 1.0).cpu())
        generations = path.generations
    seconds = (time.monotonic() - started) / len(jobs)
    stacked = torch.cat(images).unflatten(0, (count, len(seeds)))
    return Samples([p for p, _ in chosen], [c for _, c in chosen], stacked, seconds, generations)


@torch.no_grad()
def judge(samples: Samples) -> Judged:
    """Scores every picture with the reward and with the judges that were never optimised."""
    shape = samples.images.shape[:2]
    flat = samples.images.flatten(0, 1)
    tokens = tokenize_batch(samples.prompts).repeat_interleave(shape[1], dim=0)
    heldout = load_heldout_reward().eval()
    detections = load_detector().eval().detect(flat)
    contents = [content for content in samples.contents for _ in range(shape[1])]
    correct = [is_correct(content, found) for content, found in zip(contents, detections, strict=True)]
    return Judged(
        reward=load_reward().eval()(flat, tokens).view(shape),
        heldout_reward=heldout(flat, tokens).view(shape),
        correct=torch.tensor(correct).view(shape),
        style=load_style_classifier().eval()(flat).view(shape),
        diversity=diversity(heldout.embed_images(flat).view(*shape, -1))
        if shape[1] > 1
        else torch.zeros(shape[0]),
    )


def figures(samples: Samples) -> dict[str, Any]:
    """Returns the means of every figure, as the log and the report hold them."""
    judged = judge(samples)
    marks: list[tuple[Family, bool]] = [
        (content.family, bool(correct))
        for content, row in zip(samples.contents, judged.correct.tolist(), strict=True)
        for correct in row
    ]
    return {
        "reward": float(judged.reward.mean()),
        "heldout_reward": float(judged.heldout_reward.mean()),
        "geneval": summarise(marks),
        "style": float(judged.style.mean()),
        "diversity": float(judged.diversity.mean()),
        "seconds_per_image": samples.seconds_per_image,
        "generations_per_run": samples.generations_per_run,
    }
