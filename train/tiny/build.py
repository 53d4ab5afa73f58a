"""Builds the whole embedded model from nothing: art, autoencoder, base, judges.

    python train/tiny/build.py
    python train/tiny/build.py --out build/tiny --only base

Every stage resumes where it stopped, logs its losses to <out>/runs/*.jsonl and ends by writing its
weights to hyperalign/tiny/weights. About three hours on two CPU cores.
"""

from __future__ import annotations

import sys
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

from hyperalign.hosts.diffusers_tiny import decode, posterior
from hyperalign.tiny.weights import AUTOENCODER_CONFIG, load_part, save_part
from train.tiny import autoencoder as ae
from train.tiny import base as base_stage
from train.tiny.art import PACKAGES, Art, load_art
from train.tiny.judges import train_judges
from train.tiny.scenes import CONFUSED_CAPTIONS, CORRUPT_CAPTIONS, build_scenes

AUTOENCODER_SCENES = 20_000
BASE_SCENES = 30_000
SEED = 1
Stage = Literal["all", "autoencoder", "decoder", "base", "judges"]


@dataclass(frozen=True, slots=True)
class Options:
    """Builds the embedded model."""

    out: Path = Path("build/tiny")
    """Folder for art, logs and states; outside version control."""
    only: Stage = "all"
    """One stage alone; earlier stages must be done."""
    threads: int = 0
    """CPU threads; 0 leaves it to PyTorch."""


def _provenance(data: str, **details: object) -> dict[str, object]:
    return {"data": data, "art": PACKAGES, "script": "train/tiny/build.py", **details}


def save_autoencoder(model: AutoencoderKL, scale: float, **details: object) -> None:
    """Writes the autoencoder part with its latents' scaling factor."""
    header = _provenance(f"{AUTOENCODER_SCENES} EmojiScenes, seed {SEED}", scaling_factor=scale, **details)
    save_part("autoencoder", model.state_dict(), header)


def stored_autoencoder() -> tuple[AutoencoderKL, float]:
    """Returns the autoencoder part and its scaling factor. Raises HyperAlignError if it is missing."""
    state, header = load_part("autoencoder")
    model = AutoencoderKL(**AUTOENCODER_CONFIG)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), float(header["scaling_factor"])


def build_autoencoder(art: Art, runs: Path) -> None:
    """First stage: 64x64 pictures to 4x16x16 latents."""
    pixels = build_scenes(AUTOENCODER_SCENES, SEED, art).pixels
    model = ae.train_autoencoder(pixels, runs)
    save_autoencoder(model, float(model.config["scaling_factor"]), training=asdict(ae.FIT))


def build_decoder(art: Art, runs: Path) -> None:
    """Second stage: sharper details from the same latents."""
    pixels = build_scenes(AUTOENCODER_SCENES, SEED, art).pixels
    model, scale = stored_autoencoder()
    polished = ae.polish_decoder(model.requires_grad_(True), pixels, runs)
    save_autoencoder(polished, scale, training=asdict(ae.FIT), decoder_training=asdict(ae.DECODER_FIT))


def build_base(art: Art, runs: Path) -> None:
    """Third stage: text encoder and U-Net, on scenes whose captions are partly wrong."""
    scenes = build_scenes(BASE_SCENES, SEED, art)
    model, scale = stored_autoencoder()
    latents = ae.encode_all(model, scenes.pixels) * scale
    base = base_stage.train_base(latents, scenes.scenes, runs)
    header = _provenance(
        f"{BASE_SCENES} EmojiScenes in both styles, seed {SEED}",
        corrupted_captions=CORRUPT_CAPTIONS,
        training=asdict(base_stage.FIT),
        confused_captions=CONFUSED_CAPTIONS,
        confused_training=asdict(base_stage.CONFUSED_FIT),
    )
    save_part("unet", base.unet.state_dict(), header)
    save_part("text_encoder", base.text_encoder.state_dict(), header)


def build_judges(art: Art, runs: Path) -> None:
    """Last stage: two rewards, the detector and the style classifier."""
    model, _ = stored_autoencoder()

    @torch.no_grad()
    def reconstruct(images_BCHW: Tensor) -> Tensor:
        return (decode(model, posterior(model, images_BCHW * 2 - 1).mode()) / 2 + 0.5).clamp(0, 1)

    train_judges(runs, art, reconstruct)


def main() -> None:
    """Runs the chosen stages in order."""
    options = tyro.cli(Options, description=__doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    art, runs = load_art(options.out / "art"), options.out / "runs"
    stages = {
        "autoencoder": build_autoencoder,
        "decoder": build_decoder,
        "base": build_base,
        "judges": build_judges,
    }
    for name, build in stages.items():
        if options.only in ("all", name):
            build(art, runs)


if __name__ == "__main__":
    main()
