"""Trains the embedded base: a text-conditional latent diffusion U-Net on noisily captioned scenes.

Three phases. It learns to draw from captions that are mostly right. Then its text encoder, by then a bag
of words, learns to say which count, colour and side belongs to which noun, held near the words that the
U-Net knows. Then the U-Net goes on with captions in which look-alikes are often confused. So it can draw
more than it draws when asked: what alignment repairs.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from hyperalign.tiny.prompts import TEMPLATES, Content, caption
from hyperalign.tiny.text_encoder import WIDTH, TinyTextEncoder, tokenize_batch
from hyperalign.tiny.weights import NOISE_SCHEDULE, UNET_CONFIG
from train.attention import use_float32_attention
from train.tiny.attributes import ATTRIBUTES, prompt_binding
from train.tiny.fitting import Fit, run_fit
from train.tiny.pairs import sample_right
from train.tiny.scenes import Scene, confused_content, noisy_content

BATCH = 64
DROP_CAPTION = 0.1
SNR_CAP = 5.0
FIT = Fit(name="base", steps=2600, lr=8e-4, ema=0.998)
READING_FIT = Fit(name="reading", steps=1500, lr=1e-3)
ANCHOR = 2.0
"""Weight that holds the reading text encoder to the words the U-Net knows."""
CONFUSED_FIT = Fit(name="confused", steps=450, lr=4e-4, ema=0.98)


class Reader(nn.Module):
    """A text encoder with a linear read-out of what its words say about each noun."""

    def __init__(self, text_encoder: TinyTextEncoder) -> None:
        super().__init__()
        self.known = copy.deepcopy(text_encoder).requires_grad_(False)
        self.text_encoder = text_encoder
        self.attributes = nn.Linear(WIDTH, ATTRIBUTES)

    def forward(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits (B, ATTRIBUTES) of the mean token, and how far the words have moved."""
        context_BLC = self.text_encoder(tokens_BL)
        moved = (context_BLC - self.known(tokens_BL)).square().mean()
        return self.attributes(context_BLC.mean(dim=1)), moved


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


def web_captions(scenes: list[Scene], claim: Callable[[Content, random.Random], Content]) -> Tensor:
    """Returns (N, 16) tokens of one caption per scene, saying what `claim` makes of its content."""
    rng = random.Random(2)
    texts = [caption(claim(scene.content, rng), rng.choice(TEMPLATES)) for scene in scenes]
    return tokenize_batch(texts)


def train_base(latents: Tensor, scenes: list[Scene], run_dir: Path) -> Base:
    """Trains all phases on scaled latents (N, 4, 16, 16)."""
    torch.manual_seed(0)
    model = fit_base(Base(), latents, web_captions(scenes, noisy_content), run_dir, FIT)
    teach_reading(model.text_encoder, run_dir)
    return confuse(model, latents, scenes, run_dir)


def teach_reading(text_encoder: TinyTextEncoder, run_dir: Path) -> None:
    """Trains the second phase, in place."""
    torch.manual_seed(0)
    reader = Reader(text_encoder.requires_grad_(True))

    def losses_of(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"505-{step}")
        prompts = [sample_right(rng, None) for _ in range(BATCH)]
        logits, moved = reader(tokenize_batch([text for _, text in prompts]))
        return {
            "binding": prompt_binding(logits, [content for content, _ in prompts]),
            "moved": ANCHOR * moved,
        }

    run_fit(READING_FIT, reader, losses_of, run_dir)


def confuse(model: Base, latents: Tensor, scenes: list[Scene], run_dir: Path) -> Base:
    """Trains the third phase; the text encoder keeps its words apart."""
    model.requires_grad_(True).text_encoder.requires_grad_(False)
    return fit_base(model, latents, web_captions(scenes, confused_content), run_dir, CONFUSED_FIT)


def fit_base(model: Base, latents: Tensor, tokens: Tensor, run_dir: Path, fit: Fit) -> Base:
    """Trains epsilon prediction with min-SNR-5 weights on captions (N, 16).

    The weighting is Hang et al. 2023 (arXiv 2303.09556), eq 1, for epsilon prediction.
    """
    use_float32_attention(model.unet)
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
