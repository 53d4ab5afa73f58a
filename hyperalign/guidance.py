"""Gradient guidance by a reward on the one-step prediction.

FreeDoM (arXiv 2303.09833) moves x_t down the gradient of an energy of the one-step prediction
x0-hat(x_t); DyMO (arXiv 2412.00759) does so with preference rewards. `guided_through` follows them: the
gradient goes through the base model. In `guided` it ends at x0-hat, as in MPGD (arXiv 2311.16424): x0-hat
itself is moved, so that the base model needs no backward pass and may be quantised, compiled or offloaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import HyperAlignError

GRADIENT_SCALE = 1024.0
"""Prevents underflow in half precision; only the direction of the gradient is used."""

Score = Callable[[Tensor], Tensor]
"""Differentiable scores (B,) of one-step predictions; may be called in inference mode."""


def guided(x0_BCHW: Tensor, sigma: float, strength: float, score: Score) -> Tensor:
    """Returns one-step predictions moved towards a greater score.

    x0 + s w(sigma) rms(x0) g / rms(g), with g = d score / d x0 and rms over each sample: FreeDoM's and
    DyMO's step sizes are relative as well. w = sigma / (1 + sigma) falls to 0 with the noise, because
    artefacts of late steps would not be smoothed any more.

    Args:
        x0_BCHW: one-step predictions, (B, C, H, W) or of any other rank.
        sigma: noise level, at least 0.
        strength: size of a step relative to that of the prediction; 0 returns it unchanged.
        score: the score to increase.

    Raises:
        HyperAlignError: the score has no gradient, or one that is not finite.
    """
    if strength == 0.0 or sigma == 0.0:
        return x0_BCHW
    with torch.inference_mode(False), torch.enable_grad():
        leaf_BCHW = x0_BCHW.detach().clone().requires_grad_()
        direction_BCHW = _direction(score(leaf_BCHW), leaf_BCHW)
    return x0_BCHW + (strength * prediction_size(x0_BCHW, sigma) * direction_BCHW).to(x0_BCHW.dtype)


def guided_through(
    x_BCHW: Tensor, predict: Callable[[Tensor], tuple[Tensor, Tensor]], strength: float, score: Score
) -> Tensor:
    """Returns one-step predictions of noisy latents, moved along the score's gradient through the model.

    x0(x) + s n g / rms(g), with g = d score(x0(x)) / d x. FreeDoM (Algorithm 1) subtracts rho grad E from
    x_{t-1}; here the term is added to the score of p(x_t) instead, which moves x0, so that it works with
    every sampler and does not depend on the number of steps. The size is FreeDoM's: its code
    takes rho = 0.2 cfg rms(eps_c - eps_u) / rms(grad E) (DyMO's does without cfg), and in terms of x0
    sigma (eps_c - eps_u) is x0_u - x0_c.

    Args:
        x_BCHW: noisy latents, (B, C, H, W) or of any other rank.
        predict: differentiable; returns the one-step predictions and n, (B, 1, ...).
        strength: size of a step relative to n.
        score: the score to increase.

    Raises:
        HyperAlignError: the prediction or the score has no gradient, or one that is not finite.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf_BCHW = x_BCHW.detach().clone().requires_grad_()
        x0_BCHW, size_B111 = predict(leaf_BCHW)
        if not x0_BCHW.requires_grad:
            raise HyperAlignError(
                "The model's prediction has no gradient to the noisy image: a patch cuts it off. End the "
                "gradient at the prediction, or remove that patch."
            )
        direction_BCHW = _direction(score(x0_BCHW), leaf_BCHW)
    return (x0_BCHW + strength * size_B111 * direction_BCHW).detach().to(x_BCHW.dtype)


def prediction_size(x0_BCHW: Tensor, sigma: float) -> Tensor:
    """Returns the size (B, 1, ...) of a step relative to the predictions: sigma / (1 + sigma) rms(x0)."""
    return sigma / (1.0 + sigma) * _rms(x0_BCHW.detach())


def guidance_size(cond_BCHW: Tensor, uncond_BCHW: Tensor, cfg: float) -> Tensor:
    """Returns the size (B, 1, ...) of classifier-free guidance: cfg rms(x0_c - x0_u), as in FreeDoM."""
    return abs(cfg) * _rms((cond_BCHW - uncond_BCHW).detach())


def _direction(scores_B: Tensor, leaf_BCHW: Tensor) -> Tensor:
    """Returns d scores / d leaf with an rms of 1 for each sample. Raises HyperAlignError."""
    loss = -scores_B.sum() * GRADIENT_SCALE
    if not loss.requires_grad:
        raise HyperAlignError("The reward has no gradient to the image. Choose another reward.")
    (gradient_BCHW,) = torch.autograd.grad(loss, leaf_BCHW)
    if not bool(torch.isfinite(gradient_BCHW).all()):
        raise HyperAlignError(
            "The reward's gradient is NaN or infinite. Lower the strength, or start later in the run."
        )
    return -gradient_BCHW / _rms(gradient_BCHW).clamp_min(1e-12)


def _rms(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.float().square().mean(dim=tuple(range(1, x_BCHW.dim())), keepdim=True).sqrt()
