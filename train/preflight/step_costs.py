"""Costs of the parts of a training step: backbone, hypernetwork, decoder, rewards; on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperalign.families.dit import TransformerSpec
from hyperalign.hosts.diffusers.adapter import Adapter, spec_of
from hyperalign.perception import Perceived
from hyperalign.rewards import Reward, clip, loading, tiny
from hyperalign.rewards.clip import ClipReward
from hyperalign.rewards.heads import HeadReward
from hyperalign.rewards.image_reward import ImageRewardNetwork
from hyperalign.rewards.networks import dtype_of, encoder_weight, fill, set_checkpointing
from hyperalign.schedule import Schedule
from hyperalign.targets import BaseSpec
from train.config import TrainConfig
from train.data.random_inputs import TEXT_WIDTHS, RandomPromptEncoder
from train.inputs import reward_names
from train.models.architectures import FULL_SIZES, ModelSize, architecture, autoencoder
from train.models.autoencoder import Autoencoder
from train.models.base import Base, Conditions, with_guidance
from train.models.load import backbone_dtype, make_base
from train.models.step_aware import make_step_aware
from train.models.text_encoders import context_tokens, text_lengths
from train.preflight.costs import NOTHING, Cost, cost_of, operations_until
from train.start import new_hyperalign

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What each part of a step costs, for one sample of the backbone's batch or for one image."""

    sampling: Cost
    """A sample through the adapted backbone, without gradient."""
    training: Cost
    """A sample through the adapted backbone, with gradient to the cores."""
    perception: float
    """Operations of the perception blocks for one sample."""
    generation: Cost
    """A sample through the hypernetwork, with gradient."""
    decoding: Cost
    """An image through the decoder, with gradient."""
    scoring: Cost
    """An image through all optimised rewards, with gradient."""
    parameters: dict[str, int]
    """Of the backbone, autoencoder, hypernetwork and each reward, also those that are only measured."""
    targets: int
    """Adapted projections."""
    cfg: bool
    """Whether classifier-free guidance takes a second sample for each image."""


def step_costs(config: TrainConfig, backbone: nn.Module, autoencoder: nn.Module) -> StepCosts:
    """Returns the costs of a recipe's step; takes seconds.

    Args:
        config: a recipe for a real base model.
        backbone: its U-Net or transformer on the meta device; changed into the recipe's precision.
        autoencoder: the one that decodes in training, on the meta device; changed too.

    Raises:
        HyperAlignError: the hypernetwork does not fit the base model, or a reward is unknown.
    """
    base = meta_base(config, backbone, autoencoder)
    with META:
        hyperalign = new_hyperalign(config, backbone, Schedule("S"))
        x_1CHW, t_1 = torch.randn(1, *base.latent_shape), torch.ones(1)
        core_1MDA = torch.zeros(1, len(hyperalign.header.targets), config.network.b, config.network.a)
        perceived = meta_perceived(spec_of(backbone), base.latent_shape[-1])
    adapter = Adapter(backbone, hyperalign)
    conditions = with_guidance(base, meta_conditions(config, max(text_lengths(config))), 1.0)
    call = base.call(x_1CHW, t_1, conditions)
    last = last_perceiving(backbone, hyperalign.header.perception_blocks)
    with torch.no_grad():
        sampling = cost_of(lambda: adapter.forward(call, core_1MDA))
    perception = operations_until(last, lambda: backbone(**call))
    if config.model.recomputes_backbone:
        adapter.checkpoint_activations()
    core_1MDA.requires_grad_()
    for parameter in hyperalign.network.parameters():  # the optimiser's bytes count the gradients
        parameter.grad = torch.zeros_like(parameter)
    rewards = meta_rewards(config)
    return StepCosts(
        sampling=sampling,
        training=cost_of(lambda: adapter.forward(call, core_1MDA)),
        perception=perception,
        generation=cost_of(lambda: hyperalign.network(perceived)),
        decoding=cost_of(lambda: base.decode(x_1CHW.requires_grad_())),
        scoring=scoring(config, [rewards[name] for name in config.objective.rewards if name in rewards]),
        parameters={
            "backbone": _count(backbone),
            "autoencoder": _count(autoencoder),
            "hypernetwork": _count(hyperalign.network),
            **{name: _count(reward.module) for name, reward in rewards.items()},
            **step_aware_size(config),
        },
        targets=len(hyperalign.header.targets),
        cfg=base.cfg,
    )


def costs_of_shape(config: TrainConfig, shape: ModelSize | None = None) -> StepCosts:
    """Returns the costs of a recipe's step with a base model of a shape, or of the usual one."""
    with META:
        models = (
            architecture(config.model.base, shape or FULL_SIZES[config.model.base]),
            autoencoder(config.model.base),
        )
    return step_costs(config, *models)


def without_recomputation(config: TrainConfig) -> TrainConfig:
    """Returns the recipe without gradient checkpointing: its operations are the model's own."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, gradient_checkpointing="none"))


def meta_base(config: TrainConfig, backbone: nn.Module, autoencoder: nn.Module) -> Base:
    """Returns a base model on the meta device, in the precision of the recipe."""
    for model in (backbone, autoencoder):
        nn.Module.to(model, backbone_dtype(config)).eval().requires_grad_(False)
    return make_base(config, backbone, Autoencoder(autoencoder, config.model.recomputes_images), "epsilon")


def meta_conditions(config: TrainConfig, length: int) -> Conditions:
    """Returns the conditions of one text at a padding."""
    width, pooled = TEXT_WIDTHS[config.model.base]
    return RandomPromptEncoder(width, pooled, (context_tokens(config, length),), META).conditions([""])


def meta_perceived(spec: BaseSpec, side: int) -> Perceived:
    """Returns what is perceived of one sample of square latents, without values."""
    maps = [torch.zeros(1, *shape) for shape in feature_shapes(spec, side)]
    return Perceived(maps, torch.zeros(1, spec.text_channels))


def feature_shapes(spec: BaseSpec, side: int) -> list[tuple[int, int, int]]:
    """Returns the shapes (C, H, W) of perception's maps for square latents of a side."""
    if isinstance(spec, TransformerSpec):
        return [(spec.hidden, side // spec.patch, side // spec.patch)]
    return [(channels, side >> level, side >> level) for level, channels in enumerate(spec.feature_channels)]


def last_perceiving(backbone: nn.Module, blocks: int) -> nn.Module:
    """Returns the last module of perception. Raises HyperAlignError if there is none."""
    spec = spec_of(backbone)
    if isinstance(spec, TransformerSpec):
        return backbone.get_submodule(spec.perception_paths(blocks)[0])
    return backbone.get_submodule(f"down_blocks.{len(spec.feature_channels) - 1}")


def meta_rewards(config: TrainConfig) -> dict[str, Reward]:
    """Returns the rewards of a recipe without those of the tiny model, which cost nothing."""
    names = [name for name in reward_names(config) if name not in tiny.NAMES]
    return {name: meta_reward(name, backbone_dtype(config)) for name in names}


def meta_reward(name: str, dtype: torch.dtype) -> Reward:
    """Returns a reward without memory for its weights. Raises HyperAlignError on another name."""
    published = loading.published_reward(name)
    with META:
        network = published.network()
        state = {
            key: torch.empty(value.shape, dtype=dtype_of(key, dtype))
            for key, value in network.state_dict().items()
        }
    fill(network, state)
    vocabulary = published.vocabulary
    return published.assemble(name, network, vocabulary.hash_tokenizer if vocabulary else None)


def step_aware_size(config: TrainConfig) -> dict[str, int]:
    """Returns the parameters of a recipe's step-aware model, which is a reward of its own; empty for none."""
    if config.step_reward is None:
        return {}
    reward = meta_reward(next(iter(config.objective.rewards)), backbone_dtype(config))
    with META:
        model = make_step_aware(reward)
    return {"step-aware model": _count(model.reward.module) + _count(model.modulation)}


def scoring(config: TrainConfig, rewards: Sequence[Reward]) -> Cost:
    """Returns the cost of one image through all rewards, with gradient to the image."""
    total, side = NOTHING, config.model.resolution
    for reward in rewards:
        set_checkpointing(reward.module, config.model.recomputes_images)
        image_1CHW = torch.zeros(1, 3, side, side, device=META, requires_grad=True)
        total = total.beside(cost_of(lambda reward=reward, image=image_1CHW: embed(reward, image)))
    return total


def embed(reward: Reward, images_BCHW: Tensor) -> Tensor:
    """Returns a reward's embeddings of images.

    That is nearly all of the work of a score, whose rest needs values, which meta tensors do not have.
    """
    network, dtype = reward.module, encoder_weight(reward.module).dtype
    if isinstance(network, ImageRewardNetwork):
        return network.encode_images(clip.preprocess(images_BCHW).to(dtype))
    if isinstance(reward, (ClipReward, HeadReward)):
        return reward.module.embed_images(reward.preprocess(images_BCHW).to(dtype))
    raise TypeError(f"how {type(reward).__name__} embeds images is not known here")


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
