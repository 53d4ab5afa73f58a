"""A real base model's materials: prompts and latent shards from disk, cached texts, reward models."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F

from hyperalign.checkpoint import HyperAlign
from hyperalign.errors import HyperAlignError
from hyperalign.rewards import Reward, download, loading
from hyperalign.rewards.networks import set_checkpointing
from train.config import TrainConfig
from train.data.embeddings import CachedPromptEncoder
from train.data.prompts import load_prompts
from train.data.shards import LatentShards
from train.image_grid import save_grid
from train.materials import Evaluate, Materials, PromptList, ShardImages
from train.models.base import Base, PromptEncoder
from train.models.fsdp import shard_backbone, uses_fsdp
from train.models.image_encoder import image_encoder
from train.models.load import backbone_dtype, check_folder, load_base
from train.models.text_encoders import load_text_encoders, text_fingerprint, text_lengths
from train.objective import Rewards
from train.runtime import Row
from train.sampling import SampledImages, sample

EVAL_SEEDS = (0, 1)
PATIENCE = 90.0
"""Seconds within which network disks show what another machine wrote."""


def needs_images(config: TrainConfig) -> bool:
    """Returns whether a run reads preference images."""
    o = config.objective
    return o.preference_weight > 0 or (o.reward_weight > 0 and o.state != "rollout")


def open_images(config: TrainConfig, fingerprint: str | None) -> ShardImages | None:
    """Returns the preference images of a recipe. Raises HyperAlignError if they are not there or unfit."""
    if not needs_images(config):
        return None
    folder = config.data.preferred
    if not folder.is_dir() or folder == Path():
        raise HyperAlignError(
            f"data.preferred is {folder}; expected a folder of latent shards. Make them with "
            "train/encode.py, or set objective.preference_weight to 0 and objective.state to rollout."
        )
    shards = LatentShards(folder, fingerprint, config.model.resolution)
    return ShardImages(shards, config.run.seed)


def read_prompts(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Returns the prompts to train on and the validation ones. Raises HyperAlignError."""
    if config.data.prompts == Path():
        raise HyperAlignError("data.prompts is empty; expected a file of prompts. Set it.")
    prompts = load_prompts(config.data.prompts)
    if not config.eval.every:
        return prompts, []
    if config.eval.file == Path():
        raise HyperAlignError(
            "eval.file is empty; expected a file of validation prompts. Set it, or set eval.every to 0."
        )
    return prompts, load_prompts(config.eval.file)[: config.eval.prompts]


def load_rewards(config: TrainConfig, device: torch.device) -> dict[str, Reward]:
    """Returns the optimised and the watched rewards by name, frozen. Raises HyperAlignError."""
    names = dict.fromkeys([*config.objective.rewards, *config.eval.rewards])
    tokenizer = check_folder(config) / "tokenizer"
    rewards = {
        name: loading.load(
            name, config.data.rewards, device=device, dtype=backbone_dtype(config),
            tokenizer_folder=tokenizer if tokenizer.is_dir() else None,
        )
        for name in names
    }  # fmt: skip
    return rewards


def download_rewards(config: TrainConfig) -> None:
    """Fetches the weights of a recipe's rewards. Raises HyperAlignError."""
    for name in dict.fromkeys([*config.objective.rewards, *config.eval.rewards]):
        download.download(name, config.data.rewards)


def cached_texts(config: TrainConfig, accelerator: Accelerator, texts: Sequence[str]) -> CachedPromptEncoder:
    """Returns the conditions of all texts of a run; computes those that are new, then frees the encoders.

    Raises:
        HyperAlignError: the encoders cannot be read, their outputs not be written, or the processes do
            not share the folder.
    """
    folder, lengths = config.data.embeddings / text_fingerprint(config), text_lengths(config)
    cache = CachedPromptEncoder(folder, lengths, accelerator.device)
    if cache.count_missing(texts):
        encode = load_text_encoders(config, accelerator.device)
        cache.fill(texts, encode, accelerator.process_index, accelerator.num_processes)
        del encode
        accelerator.free_memory()
    accelerator.wait_for_everyone()
    patience = time.monotonic() + PATIENCE
    while lacking := (cache := CachedPromptEncoder(folder, lengths, accelerator.device)).count_missing(texts):
        if accelerator.num_processes == 1 or time.monotonic() > patience:
            raise HyperAlignError(
                f"{folder.resolve()} lacks {lacking} embeddings although every process wrote its share. Set "
                "data.embeddings to a folder that all machines of the run share, and model.path to one that "
                "is the same on each, then run again."
            )
        time.sleep(3.0)
    return cache


def diversity(embeddings_PSD: Tensor) -> float:
    """Returns the mean cosine distance between the first two seeds' images of each prompt."""
    first, second = F.normalize(embeddings_PSD.float(), dim=-1)[:, :2].unbind(dim=1)
    return float((1.0 - (first * second).sum(dim=-1)).mean())


def evaluation(
    config: TrainConfig,
    base: Base,
    texts: PromptEncoder,
    rewards: dict[str, Reward],
    prompts: Sequence[str],
    accelerator: Accelerator,
) -> Evaluate:
    """Returns what samples the validation prompts at two seeds and scores them by every reward.

    Each process takes its share of the prompts, as many as the others.
    """
    world = accelerator.num_processes
    own = list(prompts)[accelerator.process_index :: world][: max(1, len(prompts) // world)]

    def evaluate(hyperalign: HyperAlign, grid: Path) -> Row:
        batch = config.objective.micro_batch or config.objective.prompts
        images = sample(
            base, texts, hyperalign, own, seeds=EVAL_SEEDS, steps=config.eval.steps,
            guidance=config.objective.guidance, batch=batch,
        )  # fmt: skip
        metrics = score(images, rewards, base.device)
        save_shared_grid(images, grid, accelerator)
        means = {name: _gathered(torch.tensor([value], device=base.device), accelerator).mean().item()
                 for name, value in metrics.items()}  # fmt: skip
        return means | {"generations_per_run": images.generations_per_run}

    return evaluate


def score(images: SampledImages, rewards: dict[str, Reward], device: torch.device) -> dict[str, float]:
    """Returns the mean of every reward, the diversity by the first one's eyes, and the time of an image."""
    seeds = images.images.shape[1]
    jobs = [
        (prompt, image) for prompt, row in zip(images.prompts, images.images, strict=True) for image in row
    ]
    metrics = {"seconds_per_image": images.seconds_per_image}
    with torch.no_grad():
        for name, reward in rewards.items():
            scores = [reward.score(image[None].to(device), [prompt]) for prompt, image in jobs]
            metrics[name] = float(torch.cat(scores).mean())
        judge = next(iter(rewards.values()))
        embeddings = torch.cat([judge.embed_images(image[None].to(device)) for _, image in jobs])
    return metrics | {"diversity": diversity(embeddings.unflatten(0, (len(images.prompts), seeds)))}


def save_shared_grid(images: SampledImages, path: Path, accelerator: Accelerator) -> None:
    """Writes one image of every prompt of all processes."""
    first = _gathered(images.images[:, :1].to(accelerator.device), accelerator).cpu()
    prompts: list[str] = gather_object(images.prompts)
    if accelerator.is_main_process:
        save_grid(dataclasses.replace(images, prompts=prompts, images=first), path)


def _gathered(values: Tensor, accelerator: Accelerator) -> Tensor:
    gathered: Any = accelerator.gather(values)
    return gathered


def scoring(rewards: dict[str, Reward], weights: dict[str, float]) -> Rewards:
    """Returns the optimised rewards."""
    return Rewards({name: rewards[name].score for name in weights}, weights)


def origin(config: TrainConfig) -> dict[str, str]:
    """Returns what shaped the hypernetwork, for its header."""
    weights = [f"{weight:g} x {name}" for name, weight in config.objective.rewards.items()]
    data = config.data.preferred_name or str(config.data.preferred.name) or "none"
    return {"reward": " + ".join(weights), "preference_data": data if needs_images(config) else "none"}


def left_out(images: ShardImages | None) -> dict[str, str]:
    """Returns how many preference images were left out as unsafe, for the hypernetwork's header."""
    words = images.shards.unsafe_summary() if images else ""
    return {"unsafe": words} if words else {}


def world(config: TrainConfig, accelerator: Accelerator) -> Materials:
    """Returns the materials of a recipe for a real base model. Raises HyperAlignError."""
    check_folder(config)
    prompts, validation = read_prompts(config)
    images = open_images(config, image_encoder(config, torch.device("cpu")).fingerprint)
    captions = images.shards.captions() if images else []
    texts = cached_texts(config, accelerator, [*prompts, *validation, *captions, ""])
    base = load_base(config, accelerator.device)
    if uses_fsdp(accelerator):
        shard_backbone(base.backbone)
    rewards = load_rewards(config, accelerator.device)
    for reward in rewards.values():
        set_checkpointing(reward.module, config.model.recomputes_images)
    return Materials(
        base=base,
        texts=texts,
        prompts=PromptList(prompts),
        preferred=images,
        rewards=scoring(rewards, config.objective.rewards),
        evaluate=evaluation(config, base, texts, rewards, validation, accelerator),
        origin=origin(config) | left_out(images),
    )
