"""What a run works with: base model, text conditions, prompts, preference images, rewards, validation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.tiny import load_tiny
from hyperalign.rewards import Reward, download, loading
from hyperalign.rewards.networks import set_checkpointing
from hyperalign.tiny.text_encoder import tokenize_batch
from train.config import TrainConfig
from train.data.embeddings import CachedPromptEncoder
from train.data.prompts import load_prompts
from train.data.random_inputs import PROMPTS, TEXT_WIDTHS, RandomImages, RandomPromptEncoder
from train.data.shards import LatentShards
from train.data.streams import PairDataset, PreferenceDataset, PreferenceShards, PromptList, Prompts
from train.models.architectures import ModelSize, architecture, autoencoder, with_random_weights
from train.models.attention import use_float32_attention
from train.models.autoencoder import Autoencoder
from train.models.base import Base, PromptEncoder
from train.models.fsdp import shard_backbone, uses_fsdp
from train.models.image_encoder import image_encoder
from train.models.load import backbone_dtype, check_folder, load_base, make_base
from train.models.rewards import load_reward
from train.models.speed import speed_up
from train.models.step_aware import StepAware, check_step_aware, load_step_aware, random_step_aware
from train.models.text_encoders import (
    check_cache_limit,
    context_tokens,
    load_text_encoders,
    text_fingerprint,
    text_lengths,
)
from train.models.tiny import Tiny
from train.objective import Rewards
from train.tiny.dataset import preference_latents, rejected_latents
from train.tiny.inputs import EmojiScenes, GrammarPrompts, ScenePairs, tiny_reward
from train.validation import Validate, reward_validation, tiny_validation

PATIENCE = 90.0
"""Seconds within which network disks show what another machine wrote."""


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """What sampling a recipe's prompts takes."""

    base: Base
    encoder: PromptEncoder
    prompts: Prompts


@dataclass(frozen=True, slots=True)
class RunInputs(SamplingInputs):
    """Everything that a trainer works with besides its recipe."""

    preference: PreferenceDataset | None
    """None where no loss reads preference images."""
    rewards: Rewards
    validate: Validate
    provenance: Mapping[str, str]
    """Rewards and preference dataset, for the hypernetwork's header."""
    pairs: PairDataset | None = None
    """None where no loss reads pairs."""
    step_reward: StepAware | None = None
    """None where no method scores one-step predictions by their time."""


def load_inputs(config: TrainConfig, accelerator: Accelerator, smoke: ModelSize | None = None) -> RunInputs:
    """Returns what a recipe's run works with. Raises HyperAlignError for whatever is missing.

    `smoke` takes random weights of that size instead of the base model, rewards and data.
    """
    if config.model.base == "tiny":
        with accelerator.main_process_first():
            return tiny_inputs(config, accelerator.device, accelerator.is_main_process)
    if smoke is not None:
        return smoke_inputs(config, accelerator, smoke)
    return base_inputs(config, accelerator)


def sampling_inputs(
    config: TrainConfig, accelerator: Accelerator, prompts: Sequence[str]
) -> tuple[Base, PromptEncoder]:
    """Returns a recipe's base model and the conditions of prompts, without what training alone needs.

    Raises:
        HyperAlignError: base model or text encoders are missing, or the tiny one does not know a word.
    """
    if config.model.base == "tiny":
        tokenize_batch(list(prompts))
        base = Tiny(load_tiny(accelerator.device))
        return base, base
    encoder = cached_encoder(config, accelerator, [*prompts, ""])
    return load_base(config, accelerator.device), encoder


def base_inputs(config: TrainConfig, accelerator: Accelerator) -> RunInputs:
    """Returns the inputs of a recipe for a base model in a folder. Raises HyperAlignError."""
    check_folder(config)
    check_step_aware(config)
    prompts, validation = training_prompts(config), validation_prompts(config)
    images = open_preference_shards(config, image_encoder(config, torch.device("cpu")).fingerprint)
    captions = images.shards.captions() if images else []
    encoder = cached_encoder(config, accelerator, [*prompts, *validation, *captions, ""])
    base = load_base(config, accelerator.device)
    if uses_fsdp(accelerator):
        shard_backbone(base.backbone)
    rewards = load_rewards(config, accelerator.device)
    speed_up(config.model, base, [reward.module for reward in rewards.values()])
    steady = encoder.at(text_lengths(config)[0])
    excluded = images.shards.unsafe_summary() if images else ""
    return RunInputs(
        base=base,
        encoder=encoder,
        prompts=PromptList(prompts),
        preference=images if config.objective.needs_preference_images else None,
        pairs=images if config.objective.needs_pairs else None,
        rewards=optimised(rewards, config),
        validate=reward_validation(config, base, steady, rewards, validation, accelerator),
        provenance=provenance(config) | ({"unsafe": excluded} if excluded else {}),
        step_reward=load_step_aware(config, accelerator.device),
    )


def smoke_inputs(config: TrainConfig, accelerator: Accelerator, shape: ModelSize) -> RunInputs:
    """Returns random weights, texts and images for a recipe from `smoke_config`."""
    device, dtype, name = accelerator.device, backbone_dtype(config), config.model.base
    with torch.device("meta"):
        backbone, decoder = architecture(name, shape), autoencoder(name, shape)
    backbone = with_random_weights(backbone, device, dtype)
    if uses_fsdp(accelerator):
        shard_backbone(backbone)
    decoder = Autoencoder(with_random_weights(decoder, device, dtype), config.model.recomputes_images)
    base = make_base(config, backbone, decoder, "epsilon")
    width, pooled = TEXT_WIDTHS[name]
    lengths = tuple(context_tokens(config, padding) for padding in text_lengths(config))
    encoder = RandomPromptEncoder(width, pooled, lengths, device)
    images = RandomImages(base.latent_shape)
    rewards = {
        reward: loading.random_weights(reward, device=device, dtype=dtype)
        for reward in config.objective.rewards
    }
    for reward in rewards.values():
        set_checkpointing(reward.module, config.model.recomputes_images)
    speed_up(config.model, base, [reward.module for reward in rewards.values()])
    steady = dataclasses.replace(encoder, lengths=lengths[:1])
    validation = PROMPTS[: config.validation.prompt_count]
    return RunInputs(
        base=base,
        encoder=encoder,
        prompts=PromptList(list(PROMPTS)),
        preference=images if config.objective.needs_preference_images else None,
        pairs=images if config.objective.needs_pairs else None,
        rewards=optimised(rewards, config),
        validate=reward_validation(config, base, steady, rewards, validation, accelerator),
        provenance=provenance(config),
        step_reward=random_step_aware(config, device),
    )


def tiny_inputs(config: TrainConfig, device: torch.device, is_main: bool = True) -> RunInputs:
    """Returns the inputs of a recipe for the embedded tiny model. Raises HyperAlignError."""
    base = Tiny(load_tiny(device))
    if config.optim.bf16 and device.type == "cpu":
        use_float32_attention(base.model.unet)
    preference = tiny_preference(config, base)
    return RunInputs(
        base=base,
        encoder=base,
        prompts=reward_prompts(config),
        preference=preference,
        rewards=Rewards({"tiny reward": tiny_reward(device)}, config.objective.rewards),
        validate=tiny_validation(config, base, is_main),
        provenance={
            "reward": step_aware_too(
                config, "tiny preference reward (hyperalign/tiny/weights/reward.safetensors)"
            ),
            "preference_data": "EmojiScenes, right captions, Fluent style (Fluent Emoji, MIT)",
        },
        pairs=tiny_pairs(config, base, preference) if config.objective.needs_pairs else None,
        step_reward=load_step_aware(config, device),
    )


def reward_prompts(config: TrainConfig) -> Prompts:
    """Returns the prompts of the reward loss: data.prompts, or for the tiny model those of its grammar.

    Raises HyperAlignError where they cannot be read, or have words that the tiny model does not know.
    """
    if config.model.base != "tiny":
        return PromptList(training_prompts(config))
    if config.data.prompts == Path():
        return GrammarPrompts(config.data.families, config.data.wordings)
    prompts = load_prompts(config.data.prompts)
    tokenize_batch(prompts)
    return PromptList(prompts)


def tiny_preference(config: TrainConfig, base: Tiny) -> EmojiScenes | PreferenceShards:
    """Returns EmojiScenes, or the latent shards of data.preference. Raises HyperAlignError."""
    if config.data.preference == Path():
        return EmojiScenes(preference_latents(base.model, config.data))
    encoder = image_encoder(config, base.device)
    shards = LatentShards(config.data.preference, encoder.fingerprint, encoder.resolution)
    return PreferenceShards(shards, config.run.seed)


def tiny_pairs(config: TrainConfig, base: Tiny, preference: EmojiScenes | PreferenceShards) -> PairDataset:
    """Returns the preference images with those that lost. Raises HyperAlignError if shards have none."""
    if isinstance(preference, PreferenceShards):
        preference.shards.check_pairs()
        return preference
    scenes = preference.scenes
    return ScenePairs(scenes, rejected_latents(base.model, config.data, scenes.captions))


def training_prompts(config: TrainConfig) -> list[str]:
    """Returns the prompts to train on. Raises HyperAlignError."""
    if config.data.prompts == Path():
        raise HyperAlignError("data.prompts is empty; expected a file of prompts. Set it.")
    return load_prompts(config.data.prompts)


def validation_prompts(config: TrainConfig) -> list[str]:
    """Returns the validation prompts, none where validation is off. Raises HyperAlignError."""
    validation = config.validation
    if not validation.every:
        return []
    if validation.prompts == Path():
        raise HyperAlignError(
            "validation.prompts is empty; expected a file of validation prompts. Set it, or set "
            "validation.every to 0."
        )
    return load_prompts(validation.prompts)[: validation.prompt_count]


def open_preference_shards(config: TrainConfig, fingerprint: str | None) -> PreferenceShards | None:
    """Returns a recipe's preference images or pairs, None if no loss reads them.

    Raises:
        HyperAlignError: they do not exist, are of another autoencoder or resolution, or no pairs.
    """
    o = config.objective
    if not o.needs_preference_images and not o.needs_pairs:
        return None
    folder = config.data.preference
    if not folder.is_dir() or folder == Path():
        make = (
            "train/encode.py --pairs"
            if o.needs_pairs
            else "train/encode.py, or set objective.preference_weight to 0 and objective.state to rollout"
        )
        raise HyperAlignError(
            f"data.preference is {folder}; expected a folder of latent shards. Make them with {make}."
        )
    shards = LatentShards(folder, fingerprint, config.model.resolution)
    if o.needs_pairs:
        shards.check_pairs()
    return PreferenceShards(shards, config.run.seed)


def reward_names(config: TrainConfig) -> Iterable[str]:
    """Returns the names of the optimised rewards and of those that are measured alone."""
    return dict.fromkeys([*config.objective.rewards, *config.validation.rewards])


def load_rewards(config: TrainConfig, device: torch.device) -> dict[str, Reward]:
    """Returns all rewards of a recipe by name, frozen. Raises HyperAlignError."""
    return {name: load_reward(config, name, device) for name in reward_names(config)}


def download_rewards(config: TrainConfig) -> None:
    """Downloads the weights of a recipe's rewards. Raises HyperAlignError."""
    for name in reward_names(config):
        download.download(name, config.data.rewards)


def optimised(rewards: Mapping[str, Reward], config: TrainConfig) -> Rewards:
    """Returns the weighted sum of the optimised rewards."""
    weights = config.objective.rewards
    return Rewards({name: rewards[name].score_finite for name in weights}, weights)


def provenance(config: TrainConfig) -> dict[str, str]:
    """Returns the names of rewards and preference dataset, for the hypernetwork's header."""
    o = config.objective
    weights = [f"{weight:g} x {name}" for name, weight in o.optimised.items()]
    data = config.data.preference_name or str(config.data.preference.name) or "none"
    return {
        "reward": step_aware_too(config, " + ".join(weights) or "none"),
        "preference_data": data if o.needs_preference_images or o.needs_pairs else "none",
    }


def step_aware_too(config: TrainConfig, reward: str) -> str:
    """Returns a reward's name, with the file of its step-aware model if the recipe has one."""
    return reward if config.step_reward is None else f"{reward}, step-aware ({config.step_reward.name})"


def cached_encoder(
    config: TrainConfig, accelerator: Accelerator, prompts: Sequence[str]
) -> CachedPromptEncoder:
    """Returns the conditions of all prompts of a run; computes those that are new, then frees the encoders.

    Raises:
        HyperAlignError: the cache would grow beyond its limit, the encoders cannot be read, their outputs
            cannot be written, or the processes do not share the folder.
    """
    folder, lengths = config.data.embeddings / text_fingerprint(config), text_lengths(config)
    cache = CachedPromptEncoder(folder, lengths, accelerator.device)
    if any(new := cache.count_missing(prompts)):
        check_cache_limit(config, new)
        encode = load_text_encoders(config, accelerator.device)
        cache.fill(prompts, encode, accelerator.process_index, accelerator.num_processes)
        del encode
        accelerator.free_memory()
    accelerator.wait_for_everyone()
    patience = time.monotonic() + PATIENCE
    cache = CachedPromptEncoder(folder, lengths, accelerator.device)
    while missing := sum(cache.count_missing(prompts)):
        if accelerator.num_processes == 1 or time.monotonic() > patience:
            raise HyperAlignError(
                f"{folder.resolve()} lacks {missing} embeddings although every process wrote its share. Set "
                "data.embeddings to a folder that all machines of the run share, and model.path to one that "
                "is the same on each, then run again."
            )
        time.sleep(3.0)
        cache = CachedPromptEncoder(folder, lengths, accelerator.device)
    return cache
