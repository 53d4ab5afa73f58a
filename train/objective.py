"""The two losses: reward on guided x0-hat (Eq 8) and denoising on preferred pictures (Eq 9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperalign.families.unet import LAST_TIMESTEP
from hyperalign.hosts.diffusers import Adapter, unet_call
from hyperalign.schedule import Schedule
from train.rollout import Trajectory, add_noise, alphas_cumprod, guided, predict_x0

RewardFn = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) in [0, 1] -> scores (B,)."""


def adapted_prediction(
    adapter: Adapter, x: Tensor, t_B: Tensor, context: Tensor, x_gen: Tensor, t_gen_B: Tensor
) -> Tensor:
    """Returns eps at (x, t) with weights generated from (x_gen, t_gen), with gradient to the network."""
    if x is x_gen:
        return adapter.generate_and_forward(unet_call(x, t_B, context))[0]
    cores = adapter.network(adapter.perceive(unet_call(x_gen, t_gen_B, context)))
    return adapter.forward(unet_call(x, t_B, context), cores)


def reward_loss(
    adapter: Adapter,
    decode: Callable[[Tensor], Tensor],
    reward: Callable[[Tensor, Tensor], Tensor],
    trajectory: Trajectory,
    context_2BLC: Tensor,
    tokens_BL: Tensor,
    picks: Sequence[int],
    *,
    guidance: float,
    cap: float,
) -> tuple[Tensor, Tensor]:
    """Returns L_R = mean relu(cap - R(D(x0-hat), c)), or -R without a cap, and the mean score.

    The states are the model's own rollout and detached: the gradient goes through one step only.

    Args:
        adapter: the adapted base model.
        decode: latents -> pictures, about [0, 1].
        reward: pictures in [0, 1] and prompt tokens -> scores.
        trajectory: a rollout with the current hypernetwork.
        context_2BLC: cond rows stacked on uncond rows.
        tokens_BL: the prompts' tokens, for the reward.
        picks: the steps of the rollout that get a gradient.
        guidance: classifier-free guidance scale, as in sampling.
        cap: score above which nothing more is earned.
    """
    cond, uncond = context_2BLC.chunk(2)
    rows, count = cond.shape[0], len(picks)

    def stacked(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        x = torch.cat([trajectory.states[i] for i in indices])
        t = torch.tensor([trajectory.timesteps[i] for i in indices], device=x.device).repeat_interleave(rows)
        return torch.cat([x, x]), torch.cat([t, t])

    x, t_B = stacked(picks)
    sources = [trajectory.generated_at[i] for i in picks]
    x_gen, t_gen_B = (x, t_B) if sources == list(picks) else stacked(sources)
    context = torch.cat([cond.repeat(count, 1, 1), uncond.repeat(count, 1, 1)])
    eps = guided(adapted_prediction(adapter, x, t_B, context, x_gen, t_gen_B).float(), guidance)
    half = x.shape[0] // 2
    alpha_bar = alphas_cumprod().to(x)[t_B[:half]].view(-1, 1, 1, 1)
    images = decode(predict_x0(x[:half], eps, alpha_bar)).float().clamp(0.0, 1.0)
    scores = reward(images, tokens_BL.repeat(count, 1)).float()
    loss = F.relu(cap - scores).mean() if cap < float("inf") else -scores.mean()
    return loss, scores.detach().mean()


def preference_loss(
    adapter: Adapter,
    schedule: Schedule,
    x0: Tensor,
    noise: Tensor,
    t_B: Tensor,
    context: Tensor,
    snr_cap: float = float("inf"),
) -> Tensor:
    """Returns L_G = E w(t) || eps_adapted(x_t) - noise ||^2 on preferred pictures (Eq 9).

    The weights come from the noised preferred picture itself: at x_t for S, and for P and I at the
    time when a run would have written the weights it uses at t. w(t) = min(snr, snr_cap) / snr
    (Hang et al. 2023, arXiv 2303.09556, eq 1) keeps the nearly clean pictures from drowning the rest.
    """
    alphas = alphas_cumprod().to(x0)
    alpha_bar = alphas[t_B].view(-1, 1, 1, 1)
    x_t = add_noise(x0, noise, alpha_bar)
    times = [schedule.generation_time(t / LAST_TIMESTEP) for t in t_B.tolist()]
    t_gen_B = torch.tensor([round(u * LAST_TIMESTEP) for u in times], device=t_B.device)
    same = bool((t_gen_B == t_B).all())
    x_gen = x_t if same else add_noise(x0, noise, alphas[t_gen_B].view(-1, 1, 1, 1))
    eps = adapted_prediction(adapter, x_t, t_B, context, x_gen, t_gen_B).float()
    snr = alpha_bar / (1.0 - alpha_bar)
    return ((snr.clamp(max=snr_cap) / snr) * (eps - noise).square()).mean()
