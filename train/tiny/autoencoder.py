"""Trains the embedded model's autoencoder: 64x64 RGB to 4x16x16 latents of unit deviation."""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from hyperalign.hosts.diffusers.tiny import decode, posterior
from hyperalign.tiny.weights import AUTOENCODER_CONFIG
from train.tiny.fitting import BuildSettings, Fit, run_fit

BATCH = 24
KL_WEIGHT = 1e-6
FIT = Fit(name="autoencoder", steps=1400, lr=2e-3, ema=0.99)
DECODER_FIT = Fit(name="decoder", steps=500, lr=1.5e-3, ema=0.99)


def new_autoencoder() -> AutoencoderKL:
    """Returns the untrained autoencoder (diffusers' own class, SD's architecture, factor 4)."""
    return AutoencoderKL(**AUTOENCODER_CONFIG)


def to_model_range(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(N, 64, 64, 3) uint8 -> (N, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def reconstruction_losses(
    model: AutoencoderKL, x_BCHW: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """L1 + MSE of pixels and of their gradients (edges), and a small KL term."""
    latents = posterior(model, x_BCHW)
    y_BCHW = decode(model, latents.sample(generator))
    return {
        "l1": F.l1_loss(y_BCHW, x_BCHW),
        "mse": F.mse_loss(y_BCHW, x_BCHW),
        "edges": _edge_loss(y_BCHW, x_BCHW),
        "kl": KL_WEIGHT * latents.kl().mean(),
    }


def train_autoencoder(pixels: npt.NDArray[np.uint8], settings: BuildSettings) -> AutoencoderKL:
    """Trains on scenes (N, 64, 64, 3) and stores the latents' deviation as `scaling_factor`."""
    torch.manual_seed(0)
    model = new_autoencoder()

    def losses_of(step: int) -> dict[str, Tensor]:
        rows = np.random.default_rng((1, step)).integers(len(pixels), size=BATCH)
        return reconstruction_losses(model, to_model_range(pixels[rows]), torch.Generator().manual_seed(step))

    trained = run_fit(FIT, model, losses_of, settings)
    deviation = float(encode_all(trained, pixels[:2048]).std())
    trained.register_to_config(scaling_factor=1.0 / deviation)
    return trained


def finetune_decoder(
    model: AutoencoderKL, pixels: npt.NDArray[np.uint8], settings: BuildSettings
) -> AutoencoderKL:
    """Trains the decoder alone for sharper details; latents, and so the base model, do not change."""
    model = copy.deepcopy(model)
    decoder = nn.ModuleList(model.get_submodule(name) for name in ("post_quant_conv", "decoder"))

    def losses_of(step: int) -> dict[str, Tensor]:
        rows = np.random.default_rng((3, step)).integers(len(pixels), size=BATCH)
        x_BCHW = to_model_range(pixels[rows])
        with torch.no_grad():
            z_BCHW = posterior(model, x_BCHW).mode()
        y_BCHW = decoder[1](decoder[0](z_BCHW))
        return {"l1": F.l1_loss(y_BCHW, x_BCHW), "edges": _edge_loss(y_BCHW, x_BCHW)}

    trained = run_fit(DECODER_FIT, decoder, losses_of, settings)
    decoder.load_state_dict(trained.state_dict())
    return model.eval()


def _edge_loss(y_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """L1 between horizontal and vertical differences, which keeps small faces sharp."""
    return F.l1_loss(y_BCHW.diff(dim=-1), x_BCHW.diff(dim=-1)) + F.l1_loss(
        y_BCHW.diff(dim=-2), x_BCHW.diff(dim=-2)
    )


@torch.no_grad()
def encode_all(model: AutoencoderKL, pixels: npt.NDArray[np.uint8], batch: int = 256) -> Tensor:
    """Returns unscaled latents (N, 4, 16, 16) of every image (posterior mode)."""
    chunks = [pixels[i : i + batch] for i in range(0, len(pixels), batch)]
    return torch.cat([posterior(model, to_model_range(chunk)).mode() for chunk in chunks])
