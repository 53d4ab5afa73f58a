"""Trains the embedded base: a text-conditional latent diffusion U-Net on noisily captioned scenes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from hyperalign.tiny.prompts import TEMPLATES, caption
from hyperalign.tiny.text_encoder import TinyTextEncoder, tokenize_batch
from hyperalign.tiny.weights import NOISE_SCHEDULE, UNET_CONFIG
from train.attention import use_float32_attention
from train.tiny.fitting import Fit, run_fit
from train.tiny.scenes import Scene, noisy_content

BATCH = 64
DROP_CAPTION = 0.1
SNR_CAP = 5.0
FIT = Fit(name="base", steps=2600, lr=8e-4, ema=0.998)


class Base(nn.Module):
    """The U-Net and the text encoder it is trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = TinyTextEncoder()
        self.unet = new_unet()


def new_unet() -> UNet2DConditionModel:
    """Returns the untrained U-Net: SD's anatomy at widths 64, 128, 128, cross-attention everywhere."""
    return UNet2DConditionModel(**UNET_CONFIG)


def noise_schedule() -> DDPMScheduler:
    """Returns Stable Diffusion's training schedule."""
    return DDPMScheduler(**NOISE_SCHEDULE)


def web_captions(scenes: list[Scene], seed: int) -> Tensor:
    """Returns (N, 16) tokens of one caption per scene, some of them wrong as web captions are."""
    rng = random.Random(seed)
    texts = [caption(noisy_content(scene.content, rng), rng.choice(TEMPLATES)) for scene in scenes]
    return tokenize_batch(texts)


def train_base(latents: Tensor, scenes: list[Scene], run_dir: Path, fit: Fit = FIT) -> Base:
    """Trains on scaled latents (N, 4, 16, 16); epsilon prediction, min-SNR-5 weights.

    The weighting is Hang et al. 2023 (arXiv 2303.09556), eq 1, for epsilon prediction.
    """
    torch.manual_seed(0)
    model = Base()
    use_float32_attention(model.unet)
    tokens = web_captions(scenes, seed=2)
    empty = tokenize_batch([""])[0]
    alphas = noise_schedule().alphas_cumprod
    snr = alphas / (1.0 - alphas)
    weights = snr.clamp(max=SNR_CAP) / snr

    def losses_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((2, step))
        rows = torch.from_numpy(rng.integers(len(latents), size=BATCH))
        generator = torch.Generator().manual_seed(step)
        x0, noise = latents[rows], torch.randn(BATCH, *latents.shape[1:], generator=generator)
        t = torch.randint(0, len(alphas), (BATCH,), generator=generator)
        text = tokens[rows].clone()
        text[torch.rand(BATCH, generator=generator) < DROP_CAPTION] = empty
        alpha = alphas[t].view(-1, 1, 1, 1)
        x_t = alpha.sqrt() * x0 + (1.0 - alpha).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model.unet(x_t, t, model.text_encoder(text)).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        return {"denoise": (weights[t] * error).mean()}

    trained = run_fit(fit, model, losses_of, run_dir)
    if not isinstance(trained, Base):
        raise TypeError(f"expected a Base, found {type(trained).__name__}")
    return trained
