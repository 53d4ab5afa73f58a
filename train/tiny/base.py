"""Trains the embedded base: a text-conditional latent diffusion U-Net on noisily captioned scenes.

Its text encoder learns to read first and is then frozen, as the pretrained one of Stable Diffusion is:
learned from the denoising loss alone, it remains a bag of words for a long time, and no adaptation of
the U-Net can find out afterwards which of two colours belongs to which shape.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from hyperalign.hosts.diffusers_tiny import TinyBase
from hyperalign.tiny.prompts import TEMPLATES, caption
from hyperalign.tiny.text_encoder import WIDTH, TinyTextEncoder, tokenize_batch
from hyperalign.tiny.weights import NOISE_SCHEDULE, UNET_CONFIG
from train.attention import use_float32_attention
from train.rollout import add_noise, alphas_cumprod, predict_x0
from train.tiny.attributes import ATTRIBUTES, prompt_binding
from train.tiny.fitting import Fit, run_fit
from train.tiny.pairs import sample_right
from train.tiny.scenes import Scene, noisy_content

BATCH = 64
DROP_CAPTION = 0.1
SNR_CAP = 5.0
READING_FIT = Fit(name="reading", steps=1500, lr=1.5e-3)
FIT = Fit(name="base", steps=2600, lr=8e-4, ema=0.998)


class Reader(nn.Module):
    """A text encoder with a linear read-out of what its words say about each noun."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = TinyTextEncoder()
        self.attributes = nn.Linear(WIDTH, ATTRIBUTES)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Returns logits (B, ATTRIBUTES) of the mean token, so that words must hold what is bound to them."""
        return self.attributes(self.text_encoder(tokens_BL).mean(dim=1))


class Base(nn.Module):
    """The U-Net and the text encoder it listens to."""

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


def teach_reading(run_dir: Path, fit: Fit = READING_FIT) -> TinyTextEncoder:
    """Returns a frozen text encoder that binds counts, colours and sides to their nouns."""
    torch.manual_seed(0)
    reader = Reader()

    def losses_of(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"505-{step}")
        prompts = [sample_right(rng, None) for _ in range(BATCH)]
        logits = reader(tokenize_batch([text for _, text in prompts]))
        return {"binding": prompt_binding(logits, [content for content, _ in prompts])}

    run_fit(fit, reader, losses_of, run_dir)
    return reader.text_encoder.eval().requires_grad_(False)


def train_base(latents: Tensor, scenes: list[Scene], run_dir: Path, fit: Fit = FIT) -> Base:
    """Trains on scaled latents (N, 4, 16, 16); epsilon prediction, min-SNR-5 weights.

    The weighting is Hang et al. 2023 (arXiv 2303.09556), eq 1, for epsilon prediction.
    """
    text_encoder = teach_reading(run_dir)
    torch.manual_seed(0)
    model = Base()
    model.text_encoder = text_encoder
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


@torch.no_grad()
def one_step_guesses(base: TinyBase, images_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """Noises pictures to timesteps t and returns the unprompted base's x0-hat of them as pictures (Eq 4)."""
    x0 = base.encode(images_BCHW)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(int(t_B.sum())))
    alpha_bar = alphas_cumprod()[t_B].view(-1, 1, 1, 1)
    x_t = add_noise(x0, noise, alpha_bar)
    with torch.autocast("cpu", torch.bfloat16):
        eps = base.unet(x_t, t_B, base.encode_prompts([""] * len(x0))).sample
    return base.decode(predict_x0(x_t, eps.float(), alpha_bar))
