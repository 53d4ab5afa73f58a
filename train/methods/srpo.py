"""SRPO (Shen et al. 2025, arXiv 2509.06942): Direct-Align with semantic relative preference.

An image z is noised with a known noise eps. The model takes one step, to a less noisy timestep or in the
other direction, and what is there is freed of the noise: z-hat = (x - sigma eps) / alpha. So the image stays
sharp at any timestep, and the model's error reaches it scaled down, in the other direction with its sign
reversed. The reward compares two wordings of the prompt: (1 + k) R(positive) - R(negative), and the reverse
in the other direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from train.methods.step import Step, StepMetrics
from train.models.base import Conditions, cfg_conditions, take
from train.objective import NoisedImages, guided_prediction, noised_states, without_nan
from train.randomness import normal
from train.rollout import rollout
from train.transfer import to_device


@dataclass(frozen=True, slots=True)
class Direction:
    """Each sample's step from its start to its end, and the weights of both wordings."""

    start_B: Tensor
    end_B: Tensor
    positive_B: Tensor
    negative_B: Tensor


def srpo(step: Step) -> Iterator[StepMetrics]:
    """Adds the gradients of both directions."""
    o = step.objective
    prompts, z, eps, eps_gen = _images(step)
    position_B = step.chances(len(prompts), step.randomness.generator(10)).float()
    cond, uncond = cfg_conditions(step.base, step.inputs.encoder, prompts, o.guidance_scale)
    losses, relative = list[Tensor](), list[Tensor]()
    capped = o.reward_cap < float("inf")
    for direction in directions(step, position_B):
        for part, share in step.micro_batches(len(prompts)):
            none = None if uncond is None else take(uncond, part)
            images = NoisedImages(z[part], eps[part], eps_gen[part], direction.start_B[part], prompts[part])
            with step.autocast():
                z_hat = recovered(step, images, take(cond, part), none, direction.end_B[part])
                weights = direction.positive_B[part], direction.negative_B[part]
                reward_B = _relative_reward(step, z_hat, prompts[part], *weights)
            loss = 0.5 * (F.relu(o.reward_cap - reward_B) if capped else -reward_B).mean()
            step.backward(o.reward_weight * share * loss)
            losses.append(share * loss.detach())
            relative.append(reward_B.detach())
    yield {
        "reward_loss": torch.stack(losses).sum(),
        "reward": torch.cat(relative).mean(),
        "grad_norm_reward": step.gradient().norm(),
    }


def directions(step: Step, position_B: Tensor) -> tuple[Direction, Direction]:
    """Returns the steps that remove noise and those that add it, which meet at each sample's position.

    A position is a fraction of the range, 1 at its noisier end.
    """
    config, schedule = step.config.srpo, step.base.noise_schedule
    low, high = config.positions
    at_B, length = low + position_B * (high - low), config.stride * (high - low)
    noisier_B, middle_B, cleaner_B = (
        schedule.at_position(place_B)
        for place_B in ((at_B + length).clamp(max=high), at_B, (at_B - length).clamp(min=low))
    )
    down_B, up_B = (
        1.0 + first + position_B * (last - first)
        for first, last in (config.discount_denoising, config.discount_inversion)
    )
    minus_B = -torch.ones_like(position_B)
    return Direction(noisier_B, middle_B, down_B, minus_B), Direction(cleaner_B, middle_B, minus_B, up_B)


def recovered(
    step: Step, images: NoisedImages, cond: Conditions, uncond: Conditions | None, end_B: Tensor
) -> Tensor:
    """Returns z-hat: images, noised, moved by the model to the timesteps `end_B`, freed of the noise."""
    schedule = step.base.noise_schedule
    states = noised_states(step.base, step.schedule, images, cond, uncond)
    output = guided_prediction(
        step.adapter, step.base, states, step.objective.guidance_scale, step.objective.conditional_only
    )
    x0, eps_hat = schedule.predictions(states.x, output, states.t_B)
    moved = schedule.add_noise(x0, eps_hat, end_B)
    one, zero = torch.ones_like(moved), torch.zeros_like(moved)
    alpha, sigma = schedule.add_noise(one, zero, end_B), schedule.add_noise(zero, one, end_B)
    return (moved - sigma * images.eps) / alpha


def _relative_reward(
    step: Step, z: Tensor, prompts: Sequence[str], positive_B: Tensor, negative_B: Tensor
) -> Tensor:
    """Returns the weighted sum of the rewards for both wordings (B,); 0 where an image is not finite."""
    config, number = step.config.srpo, step.number
    images, finite_B = without_nan(step.base.decode(z).float())
    total = torch.zeros_like(finite_B, dtype=torch.float32)
    for weight_B, wordings in ((positive_B, config.positive), (negative_B, config.negative)):
        texts = [wordings[number % len(wordings)].format(prompt) for prompt in prompts]
        total = total + weight_B * step.inputs.rewards(images, texts)[0]
    return torch.where(finite_B, total, 0.0)


def _images(step: Step) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Returns prompts, latents of images, the noise they are noised with, one for all, and other noise."""
    o, rng = step.objective, step.randomness.generator(11)
    if step.state == "noised":
        images = step.preference_images(o.prompt_batch, o.preference_range, purpose=12)
        eps = to_device(normal((1, *images.x0.shape[1:]), rng), step.device)
        return images.captions, images.x0, eps.expand_as(images.x0), images.eps
    prompts, other = step.prompts_and_noise(o.prompt_batch, rng)
    noise = to_device(normal((1, *step.base.latent_shape), rng), step.device).expand_as(other)
    cond, uncond = cfg_conditions(step.base, step.inputs.encoder, prompts, o.guidance_scale)
    with step.autocast():
        trajectory = rollout(
            step.base, step.adapter, step.schedule, cond, uncond, noise,
            steps=o.rollout_steps, guidance_scale=o.guidance_scale,
        )  # fmt: skip
    return prompts, trajectory.final, noise, other
