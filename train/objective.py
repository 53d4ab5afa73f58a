"""The two losses: rewards of guided x0-hat (Eq 8), and denoising of preference images (Eq 9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.schedule import Schedule
from train.config import RewardWeighting
from train.models.base import Base, Conditions, join, repeat, take
from train.rollout import Trajectory, guided
from train.transfer import to_device

RewardFn = Callable[[Tensor, Sequence[str]], Tensor]
"""Images (B, 3, H, W), about [0, 1], and their prompts -> scores (B,)."""


@dataclass(frozen=True, slots=True)
class Rewards:
    """Rewards by name with their weights; R is their weighted sum."""

    models: Mapping[str, RewardFn]
    weights: Mapping[str, float]

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns R (B,) and each reward's own scores (B,)."""
        each = {name: model(images_BCHW, prompts).float() for name, model in self.models.items()}
        return torch.stack([self.weights[name] * scores for name, scores in each.items()]).sum(dim=0), each


@dataclass(frozen=True, slots=True)
class NoisedImages:
    """Images with the noise and timesteps that a model's error is measured at."""

    x0: Tensor
    eps: Tensor
    eps_gen: Tensor
    """Other noise, for weights that are generated at another time."""
    t_B: Tensor
    """On the CPU."""
    captions: list[str]

    def __getitem__(self, part: slice) -> NoisedImages:
        """Returns some of them."""
        return NoisedImages(
            self.x0[part], self.eps[part], self.eps_gen[part], self.t_B[part], self.captions[part]
        )


@dataclass(frozen=True, slots=True)
class States:
    """A batch of noisy latents x_t, with the (x, t) that their weights are generated from."""

    x: Tensor
    t_B: Tensor
    x_gen: Tensor
    t_gen_B: Tensor
    cond: Conditions
    uncond: Conditions | None
    """The empty prompt for each sample; None where the guidance is an input of the model."""
    prompts: list[str]
    generates: list[bool]
    """Which samples their own weights are generated from: (x_gen, t_gen) is (x, t)."""

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.x)

    def __getitem__(self, part: slice) -> States:
        """Returns some of the samples."""
        uncond = None if self.uncond is None else take(self.uncond, part)
        return States(
            self.x[part], self.t_B[part], self.x_gen[part], self.t_gen_B[part],
            take(self.cond, part), uncond, self.prompts[part], self.generates[part],
        )  # fmt: skip

    def rows(self, rows: Sequence[int]) -> States:
        """Returns the samples of these rows."""
        own = list(rows)
        uncond = None if self.uncond is None else take(self.uncond, own)
        return States(
            self.x[own], self.t_B[own], self.x_gen[own], self.t_gen_B[own], take(self.cond, own), uncond,
            [self.prompts[row] for row in own], [self.generates[row] for row in own],
        )  # fmt: skip

    def twice(self) -> States:
        """Returns all samples and then all of them again."""

        def doubled(x: Tensor) -> Tensor:
            return torch.cat([x, x])

        uncond = None if self.uncond is None else repeat(self.uncond, 2)
        return States(
            doubled(self.x), doubled(self.t_B), doubled(self.x_gen), doubled(self.t_gen_B),
            repeat(self.cond, 2), uncond, self.prompts * 2, self.generates * 2,
        )  # fmt: skip


def rollout_states(
    trajectory: Trajectory,
    picks: Sequence[int],
    cond: Conditions,
    uncond: Conditions | None,
    prompts: list[str],
) -> States:
    """Returns the states before the picked steps of a rollout: the gradient passes through one step each."""

    def stacked(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        x = torch.cat([trajectory.states[i] for i in indices])
        t = torch.tensor([trajectory.timesteps[i] for i in indices]).repeat_interleave(len(prompts))
        return x, to_device(t, x.device)

    x, t_B = stacked(picks)
    generators = [trajectory.generated_at[i] for i in picks]
    x_gen, t_gen_B = stacked(generators)
    count = len(picks)
    none = None if uncond is None else repeat(uncond, count)
    generates = [g == i for g, i in zip(generators, picks, strict=True) for _ in prompts]
    return States(x, t_B, x_gen, t_gen_B, repeat(cond, count), none, prompts * count, generates)


def noised_states(
    base: Base, schedule: Schedule, images: NoisedImages, cond: Conditions, uncond: Conditions | None
) -> States:
    """Returns noised images, whose weights are generated from the same images, noised.

    That is at t itself for S; for P and I at the timestep where sampling generates the weights it uses at t,
    with noise `eps_gen` of its own. With the same noise the hypernetwork would read off what the model is to
    predict, which no sampling can give it: at the start of a run the latents are that noise.
    """
    last, prompts, x0 = base.noise_schedule.last_timestep, images.captions, images.x0
    own_B = to_device(images.t_B, x0.device)
    x_t = base.noise_schedule.add_noise(x0, images.eps, own_B)
    if schedule.variant == "S":
        return States(x_t, own_B, x_t, own_B, cond, uncond, prompts, [True] * len(prompts))
    timesteps = [last * schedule.generation_time(t / last) for t in images.t_B.tolist()]
    t_gen_B = base.noise_schedule.nearest(torch.tensor(timesteps) / last).to(images.t_B)
    t_gen_B = to_device(t_gen_B, x0.device)
    x_gen = base.noise_schedule.add_noise(x0, images.eps_gen, t_gen_B)
    return States(x_t, own_B, x_gen, t_gen_B, cond, uncond, prompts, [False] * len(prompts))


def adapted_prediction(adapter: Adapter | None, base: Base, states: States, conditions: Conditions) -> Tensor:
    """Returns the output at (x, t) with weights generated at (x_gen, t_gen), with gradient to the network.

    Without an adapter it is the base model's: the reference of methods that compare.
    """
    call = base.call(states.x, states.t_B, conditions)
    if adapter is None:
        return base.prediction(base.backbone(**call)[0], states.x)
    if all(states.generates):
        return base.prediction(adapter.generate_and_forward(call)[0], states.x)
    cores = adapter.network(adapter.perceive(base.call(states.x_gen, states.t_gen_B, conditions)))
    return base.prediction(adapter.forward(call, cores), states.x)


def guided_prediction(
    adapter: Adapter | None, base: Base, states: States, guidance_scale: float, conditional_only: bool = False
) -> Tensor:
    """Returns the classifier-free guided output, as in sampling.

    `conditional_only` sends the gradient through the conditional prediction alone, for half the memory.
    """
    if states.uncond is None:
        return adapted_prediction(adapter, base, states, states.cond)
    if conditional_only:
        with torch.no_grad():
            uncond = adapted_prediction(adapter, base, states, states.uncond)
        return guided(adapted_prediction(adapter, base, states, states.cond), uncond, guidance_scale)
    both = join(states.cond, states.uncond)
    cond, uncond = adapted_prediction(adapter, base, states.twice(), both).chunk(2)
    return guided(cond, uncond, guidance_scale)


def reward_loss(
    adapter: Adapter,
    base: Base,
    rewards: Rewards,
    states: States,
    *,
    guidance_scale: float,
    cap: float,
    conditional_only: bool = False,
    weighting: RewardWeighting = "none",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns L_R = mean w(t) relu(cap - R(D(x0-hat), c)), -R without a cap, and each reward's scores (B,).

    An image that is not finite adds nothing to the loss, and its scores are NaN. Where it leaves NaN in the
    gradient, the trainer skips the step.

    Args:
        adapter: the adapted base model.
        base: decodes, and has the noise schedule.
        rewards: images and prompts -> R and its parts.
        states: the x_t that the one step starts from.
        guidance_scale: of classifier-free guidance, as in sampling.
        cap: a score above this has no gradient.
        conditional_only: gradient through the conditional prediction alone.
        weighting: w(t) is 1, or the signal's share of the latents' variance.
    """
    output = guided_prediction(adapter, base, states, guidance_scale, conditional_only)
    x0, _ = base.noise_schedule.predictions(states.x, output, states.t_B)
    loss_B, scores = scored(base, rewards, x0, states.prompts, cap)
    if weighting == "signal":
        loss_B = base.noise_schedule.signal(states.t_B) * loss_B
    return loss_B.mean(), scores


def scored(
    base: Base, rewards: Rewards, x0: Tensor, prompts: Sequence[str], cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns relu(cap - R), -R without a cap, of decoded latents (B,), and each reward's scores (B,).

    An image that is not finite has the loss 0, and NaN as its scores.
    """
    images, finite_B = without_nan(base.decode(x0).float())
    total, each = rewards(images, prompts)
    loss_B = F.relu(cap - total) if cap < float("inf") else -total
    nothing = float("nan")
    scores = {
        name: torch.where(finite_B, s_B.detach(), nothing) for name, s_B in (each | {"reward": total}).items()
    }
    return torch.where(finite_B, loss_B, 0.0), scores


def without_nan(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the images, grey where one is not finite, and which of them are finite (B,)."""
    finite_B = torch.isfinite(images_BCHW).flatten(1).all(dim=1)
    return torch.where(finite_B[:, None, None, None], images_BCHW, 0.5), finite_B


def preference_loss(
    adapter: Adapter, base: Base, x0: Tensor, eps: Tensor, states: States, snr_gamma: float = float("inf")
) -> Tensor:
    """Returns L_G = E w(t) || output - target ||^2 on noised preference images (Eq 9)."""
    error_B = denoising_errors(adapter, base, x0, eps, states)
    return (base.noise_schedule.loss_weight(states.t_B, snr_gamma) * error_B).mean()


def denoising_errors(adapter: Adapter | None, base: Base, x0: Tensor, eps: Tensor, states: States) -> Tensor:
    """Returns || output - target ||^2 of each image (B,), a mean over dimensions; None is the base model."""
    output = adapted_prediction(adapter, base, states, states.cond)
    target = base.noise_schedule.target(x0, eps, states.t_B)
    return (output - target).square().flatten(1).mean(dim=1)
