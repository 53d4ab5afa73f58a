"""Trains the tiny base model: a text-conditional latent diffusion U-Net on noisily captioned scenes.

In the first phase most captions are right. The text encoder also learns to classify count, colour and side
of each noun: by the denoising loss alone it stays a bag of words that encodes "red heart and blue circle"
and "blue heart and red circle" alike. In the second phase the U-Net trains on captions that often confuse
nouns and colours. So the model can generate more than it shows for a prompt, which alignment repairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from hyperalign.tiny.prompts import COLORS, MIRRORED, RELATIONS, TEMPLATES, Content, caption
from hyperalign.tiny.text_encoder import NOUN_TOKENS, VOCABULARY, WIDTH, TinyTextEncoder, tokenize_batch
from hyperalign.tiny.weights import NOISE_SCHEDULE, UNET_CONFIG
from train.models.attention import use_float32_attention
from train.tiny.fitting import BuildSettings, Fit, run_fit
from train.tiny.scenes import Scene, confused_content, noisy_content

BATCH = 64
DROP_CAPTION = 0.1
SNR_CAP = 5.0
FIT = Fit(name="base", steps=2800, lr=8e-4, ema=0.998)
CONFUSED_FIT = Fit(name="confused", steps=450, lr=4e-4, ema=0.98)
FACT_WEIGHT = 0.1
"""Weight of the auxiliary task of the text encoder."""
FACTS = (4, len(COLORS) + 1, len(RELATIONS) + 1)
"""Per noun: its count from one to four, its colour or none, its side or none."""
NO_NOUN = -100


class BaseTraining(nn.Module):
    """The U-Net, its text encoder, and the auxiliary head that classifies the facts of nouns."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = TinyTextEncoder()
        self.unet = new_unet()
        self.facts = nn.Linear(WIDTH, sum(FACTS))


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of N scenes, as tokens and as facts."""

    tokens_NL: Tensor
    facts_NGF: Tensor
    """Labels (N, 2, 3) of each noun in reading order, -100 where a caption has one noun."""


def new_unet() -> UNet2DConditionModel:
    """Returns the untrained U-Net: SD's architecture at widths 64, 128, 128, cross-attention everywhere."""
    return UNet2DConditionModel(**UNET_CONFIG)


def noise_schedule() -> DDPMScheduler:
    """Returns Stable Diffusion's training schedule."""
    return DDPMScheduler(**NOISE_SCHEDULE)


def noun_facts(content: Content) -> list[list[int]]:
    """Returns the labels (2, 3) of a content's nouns in reading order."""
    relations = (content.relation, content.relation and MIRRORED[content.relation])
    facts = [
        [
            group.count - 1,
            len(COLORS) if group.color is None else COLORS.index(group.color),
            len(RELATIONS) if relation is None else RELATIONS.index(relation),
        ]
        for group, relation in zip(content.groups, relations, strict=False)
    ]
    return facts + [[NO_NOUN] * len(FACTS)] * (2 - len(facts))


def web_captions(scenes: list[Scene], claim: Callable[[Content, random.Random], Content]) -> Captions:
    """Returns one caption per scene, of the content that `claim` returns for it."""
    rng = random.Random(2)
    claims = [claim(scene.content, rng) for scene in scenes]
    tokens = tokenize_batch([caption(content, rng.choice(TEMPLATES)) for content in claims])
    return Captions(tokens, torch.tensor([noun_facts(content) for content in claims]))


def fact_loss(logits_BLF: Tensor, tokens_BL: Tensor, facts_BGF: Tensor) -> Tensor:
    """Returns the cross-entropy of the facts, classified from the vectors at the nouns.

    Args:
        logits_BLF: the logits of every token.
        tokens_BL: captions; their nouns are found in reading order.
        facts_BGF: labels of up to two nouns per caption, -100 where there is none.
    """
    is_noun = torch.zeros(len(VOCABULARY), dtype=torch.bool)
    is_noun[list(NOUN_TOKENS)] = True
    labels_NF = facts_BGF[facts_BGF[..., 0] != NO_NOUN]
    logits_NF = logits_BLF[is_noun[tokens_BL]].float().split(FACTS, dim=-1)
    losses = [F.cross_entropy(logits, label) for logits, label in zip(logits_NF, labels_NF.T, strict=True)]
    return torch.stack(losses).sum()


def train_base(latents: Tensor, scenes: list[Scene], settings: BuildSettings) -> BaseTraining:
    """Trains both phases on scaled latents (N, 4, 16, 16)."""
    torch.manual_seed(0)
    model = fit_base(BaseTraining(), latents, web_captions(scenes, noisy_content), settings, FIT)
    # second phase: the text encoder is frozen, so that it does not learn the confusions
    model.requires_grad_(True).text_encoder.requires_grad_(False)
    return fit_base(model, latents, web_captions(scenes, confused_content), settings, CONFUSED_FIT)


def fit_base(
    model: BaseTraining, latents: Tensor, captions: Captions, settings: BuildSettings, fit: Fit
) -> BaseTraining:
    """Trains epsilon prediction with min-SNR-5 weights, and the auxiliary task.

    The weighting is Hang et al. 2023 (arXiv 2303.09556), eq 1, for epsilon prediction.
    """
    use_float32_attention(model.unet)
    empty = tokenize_batch([""])[0]
    alphas = noise_schedule().alphas_cumprod
    snr = alphas / (1.0 - alphas)
    weights = snr.clamp(max=SNR_CAP) / snr

    def losses_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((fit.steps, step))
        rows = torch.from_numpy(rng.integers(len(latents), size=BATCH))
        generator = torch.Generator().manual_seed(step)
        x0, noise = latents[rows], torch.randn(BATCH, *latents.shape[1:], generator=generator)
        t = torch.randint(0, len(alphas), (BATCH,), generator=generator)
        tokens = captions.tokens_NL[rows]
        dropped = torch.rand(BATCH, generator=generator) < DROP_CAPTION
        alpha = alphas[t].view(-1, 1, 1, 1)
        x_t = alpha.sqrt() * x0 + (1.0 - alpha).sqrt() * noise
        context = model.text_encoder(torch.where(dropped[:, None], empty, tokens))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model.unet(x_t, t, context).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        kept = ~dropped
        facts = fact_loss(model.facts(context[kept]), tokens[kept], captions.facts_NGF[rows[kept]])
        return {"denoise": (weights[t] * error).mean(), "facts": FACT_WEIGHT * facts}

    return run_fit(fit, model, losses_of, settings)
