"""Builds the whole embedded model from nothing: art, autoencoder, base, judges.

    python train/tiny/build.py
    python train/tiny/build.py --only base
    python train/tiny/build.py --out /tmp/trial --weights /tmp/trial/weights --share 0.002

Every stage resumes where it stopped, logs its losses to <out>/runs/*.jsonl and ends by writing its
weights. About an hour and a half on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

if not __package__:
    # Run as a script, train/tiny/ would be on the path instead of the project.
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch
import tyro
from diffusers import AutoencoderKL
from torch import Tensor

from hyperalign.hosts.diffusers.tiny import decode, posterior
from hyperalign.tiny.weights import AUTOENCODER_CONFIG, FOLDER, load_part, save_part
from train.tiny import autoencoder as ae
from train.tiny import base as base_stage
from train.tiny.art import Art, load_art
from train.tiny.evaluators import train_judges
from train.tiny.fitting import Workshop
from train.tiny.scenes import BASE_FLUENT, CONFUSED_CAPTIONS, CORRUPT_CAPTIONS, build_scenes

AUTOENCODER_SCENES = 20_000
BASE_SCENES = 30_000
SEED = 1
Stage = Literal["all", "autoencoder", "decoder", "base", "judges"]


@dataclass(frozen=True, slots=True)
class Options:
    """Builds the embedded model."""

    out: Path = Path("build/tiny")
    """Folder for art, logs and states; outside version control."""
    weights: Path = FOLDER
    """Folder of the finished parts."""
    only: Stage = "all"
    """One stage alone; earlier stages must be done."""
    share: float = 1.0
    """Share of each stage's steps and scenes; below 1 only tries the build out."""
    threads: int = 0
    """CPU threads; 0 leaves it to PyTorch."""


def save_autoencoder(model: AutoencoderKL, scale: float, shop: Workshop, **details: object) -> None:
    """Writes the autoencoder part with its latents' scaling factor."""
    data = f"{shop.scaled(AUTOENCODER_SCENES)} EmojiScenes, seed {SEED}"
    header = shop.header({"data": data, "scaling_factor": scale, **details})
    save_part("autoencoder", model.state_dict(), header, shop.weights)


def stored_autoencoder(shop: Workshop) -> tuple[AutoencoderKL, float]:
    """Returns the autoencoder part and its scaling factor. Raises HyperAlignError if it is missing."""
    state, header = load_part("autoencoder", shop.weights)
    model = AutoencoderKL(**AUTOENCODER_CONFIG)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), float(header["scaling_factor"])


def build_autoencoder(art: Art, shop: Workshop) -> None:
    """First stage: 64x64 images to 4x16x16 latents."""
    pixels = build_scenes(shop.scaled(AUTOENCODER_SCENES), SEED, art).pixels
    model = ae.train_autoencoder(pixels, shop)
    save_autoencoder(model, float(model.config["scaling_factor"]), shop, training=asdict(ae.FIT))


def build_decoder(art: Art, shop: Workshop) -> None:
    """Second stage: sharper details from the same latents."""
    pixels = build_scenes(shop.scaled(AUTOENCODER_SCENES), SEED, art).pixels
    model, scale = stored_autoencoder(shop)
    polished = ae.polish_decoder(model.requires_grad_(True), pixels, shop)
    save_autoencoder(polished, scale, shop, training=asdict(ae.FIT), decoder_training=asdict(ae.DECODER_FIT))


def build_base(art: Art, shop: Workshop) -> None:
    """Third stage: text encoder and U-Net, on scenes whose captions are partly wrong."""
    scenes = build_scenes(shop.scaled(BASE_SCENES), SEED, art, BASE_FLUENT)
    model, scale = stored_autoencoder(shop)
    latents = ae.encode_all(model, scenes.pixels) * scale
    base = base_stage.train_base(latents, scenes.scenes, shop)
    header = shop.header(
        {
            "data": f"{len(scenes.scenes)} EmojiScenes, seed {SEED}",
            "fluent": BASE_FLUENT,
            "corrupted_captions": CORRUPT_CAPTIONS,
            "training": asdict(base_stage.FIT),
            "confused_captions": CONFUSED_CAPTIONS,
            "confused_training": asdict(base_stage.CONFUSED_FIT),
        }
    )
    save_part("unet", base.unet.state_dict(), header, shop.weights)
    save_part("text_encoder", base.text_encoder.state_dict(), header, shop.weights)


def build_judges(art: Art, shop: Workshop) -> None:
    """Last stage: two rewards, the detector and the style classifier."""
    model, _ = stored_autoencoder(shop)

    @torch.no_grad()
    def reconstruct(images_BCHW: Tensor) -> Tensor:
        return (decode(model, posterior(model, images_BCHW * 2 - 1).mode()) / 2 + 0.5).clamp(0, 1)

    train_judges(shop, art, reconstruct)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the chosen stages in order."""
    options = tyro.cli(Options, description=__doc__, args=arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    art = load_art(options.out / "art")
    shop = Workshop(options.out / "runs", options.weights, options.share)
    stages = {
        "autoencoder": build_autoencoder,
        "decoder": build_decoder,
        "base": build_base,
        "judges": build_judges,
    }
    for name, build in stages.items():
        if options.only in ("all", name):
            build(art, shop)


if __name__ == "__main__":
    main()
