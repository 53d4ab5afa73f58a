"""A value's gradient through the base model: what DAS, FreeDoM and DyMO steer by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperalign.errors import HyperAlignError
from hyperalign.rewards import Reward
from train.models.base import Base
from train.noise import NoiseSchedule
from train.rollout import Denoiser, guided

GRADIENT_SCALE = 1024.0
"""Prevents underflow in half precision."""

NO_GRADIENT = "The reward has no gradient to the image. Choose another reward."

Value = Callable[[Tensor], Tensor]
"""One-step predictions (B, C, H, W) -> a number each (B,), with its gradient."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What the model and a value say at a noisy latent."""

    x0: Tensor
    eps: Tensor
    correction: Tensor | None
    """What classifier-free guidance adds to the output, before its scale; None where there is none."""
    value_B: Tensor
    gradient: Tensor
    """Of the value, to the noisy latent."""


def evaluated(denoiser: Denoiser, schedule: NoiseSchedule, x: Tensor, t: float, value: Value) -> Evaluated:
    """Evaluates model and value, and the value's gradient through the model.

    Raises:
        HyperAlignError: the value has no gradient, or one that is not finite.
    """
    t_B = torch.full((len(x),), t, device=x.device)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        cond, uncond = denoiser.outputs(leaf, t)
        output = cond if uncond is None else guided(cond, uncond, denoiser.guidance_scale)
        x0, eps = schedule.predictions(leaf, output, t_B)
        value_B = value(x0)
        if not value_B.requires_grad:
            raise HyperAlignError(NO_GRADIENT)
        (gradient,) = torch.autograd.grad(GRADIENT_SCALE * value_B.sum(), leaf)
    if not bool(torch.isfinite(gradient).all()):
        raise HyperAlignError(
            "The reward's gradient is NaN or infinite. Choose another reward, or fewer steps."
        )
    correction = None if uncond is None else (cond - uncond).detach()
    return Evaluated(x0.detach(), eps.detach(), correction, value_B.detach(), gradient / GRADIENT_SCALE)


def rms(x: Tensor) -> Tensor:
    """Returns the root mean square of each sample, (B, 1, ...)."""
    return x.float().square().mean(dim=tuple(range(1, x.ndim)), keepdim=True).sqrt()


def step_size(found: Evaluated, schedule: NoiseSchedule, guidance_scale: float, t: float, s: float) -> Tensor:
    """Returns what a shift from t to s is relative to, (B, 1, ...): w rms(e_c - e_u), the size of guidance.

    Where guidance is an input of the model, it is the way of a flow's step, (u_t - u_s) rms(v).
    """
    if found.correction is not None:
        return abs(guidance_scale) * rms(found.correction)
    return (schedule.sigma(t) - schedule.sigma(s)) * rms(found.eps - found.x0)


def shift(found: Evaluated, strength: float, size_B111: Tensor) -> Tensor:
    """Returns the gradient with a root mean square of strength times size in each sample."""
    return strength * size_B111 * found.gradient / rms(found.gradient).clamp_min(1e-12)


def require_gradient(reward: Reward, prompt: str, device: torch.device) -> None:
    """Raises HyperAlignError unless a reward has a gradient to the image."""
    with torch.enable_grad():
        grey = torch.full((1, 3, 64, 64), 0.5, device=device, requires_grad=True)
        if not reward.score(grey, [prompt]).requires_grad:
            raise HyperAlignError(NO_GRADIENT)


@dataclass(frozen=True, slots=True)
class ImageValue:
    """A reward of decoded predictions for one prompt each."""

    base: Base
    reward: Reward
    prompts: Sequence[str]
    largest_side: int
    """Cells of a latent's longer side, above which it is shrunk before it is decoded."""

    def __call__(self, x0_BCHW: Tensor) -> Tensor:
        """Returns the scores (B,)."""
        longer = max(x0_BCHW.shape[-2:])
        if longer > self.largest_side:
            x0_BCHW = F.interpolate(x0_BCHW, scale_factor=self.largest_side / longer, mode="area")
        return self.reward.score(self.base.decode(x0_BCHW), self.prompts)
