"""Builds the whole embedded model from nothing: art, autoencoder, base model, evaluators.

    python train/tiny/build.py
    python train/tiny/build.py --only base
    python train/tiny/build.py --out /tmp/trial --weights /tmp/trial/weights --share 0.002

Every stage resumes where it stopped, logs its losses to <out>/runs/*.jsonl and writes its weights at
the end. Hours on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

if not __package__:
    # As a script, train/tiny/ is on sys.path instead of the project.
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
from train.tiny.evaluators import Reconstruct, build_detectors, build_reward, build_validation_reward
from train.tiny.fitting import BuildSettings
from train.tiny.scenes import BASE_FLUENT, CONFUSED_CAPTIONS, CORRUPT_CAPTIONS, build_scenes

AUTOENCODER_SCENES = 20_000
BASE_SCENES = 30_000
SEED = 1
Stage = Literal["all", "autoencoder", "decoder", "base", "reward", "validation_reward", "detectors"]
BuildStage = Callable[[Art, BuildSettings], None]


@dataclass(frozen=True, slots=True)
class Options:
    """Builds the embedded model."""

    out: Path = Path("build/tiny")
    """Folder for art, logs and training checkpoints; outside version control."""
    weights: Path = FOLDER
    """Folder of the finished parts."""
    only: Stage = "all"
    """Only this stage; the earlier stages must be finished."""
    share: float = 1.0
    """Share of each stage's steps and scenes; a share below 1 only tests the build."""
    threads: int = 0
    """CPU threads; 0 for the default of PyTorch."""


def save_autoencoder(model: AutoencoderKL, scale: float, settings: BuildSettings, **details: object) -> None:
    """Writes the autoencoder part with its latents' scaling factor."""
    data = f"{settings.scaled(AUTOENCODER_SCENES)} EmojiScenes, seed {SEED}"
    header = settings.header({"data": data, "scaling_factor": scale, **details})
    save_part("autoencoder", model.state_dict(), header, settings.weights)


def stored_autoencoder(settings: BuildSettings) -> tuple[AutoencoderKL, float]:
    """Returns the autoencoder part and its scaling factor. Raises HyperAlignError if it is missing."""
    state, header = load_part("autoencoder", settings.weights)
    model = AutoencoderKL(**AUTOENCODER_CONFIG)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), float(header["scaling_factor"])


def build_autoencoder(art: Art, settings: BuildSettings) -> None:
    """First stage: 64x64 images to 4x16x16 latents."""
    pixels = build_scenes(settings.scaled(AUTOENCODER_SCENES), SEED, art).pixels
    model = ae.train_autoencoder(pixels, settings)
    save_autoencoder(model, float(model.config["scaling_factor"]), settings, training=asdict(ae.FIT))


def build_decoder(art: Art, settings: BuildSettings) -> None:
    """Second stage: sharper details from the same latents."""
    pixels = build_scenes(settings.scaled(AUTOENCODER_SCENES), SEED, art).pixels
    model, scale = stored_autoencoder(settings)
    finetuned = ae.finetune_decoder(model.requires_grad_(True), pixels, settings)
    save_autoencoder(
        finetuned, scale, settings, training=asdict(ae.FIT), decoder_training=asdict(ae.DECODER_FIT)
    )


def build_base(art: Art, settings: BuildSettings) -> None:
    """Third stage: text encoder and U-Net, on scenes whose captions are partly wrong."""
    scenes = build_scenes(settings.scaled(BASE_SCENES), SEED, art, BASE_FLUENT)
    model, scale = stored_autoencoder(settings)
    latents = ae.encode_all(model, scenes.pixels) * scale
    base = base_stage.train_base(latents, scenes.scenes, settings)
    header = settings.header(
        {
            "data": f"{len(scenes.scenes)} EmojiScenes, seed {SEED}",
            "fluent": BASE_FLUENT,
            "corrupted_captions": CORRUPT_CAPTIONS,
            "training": asdict(base_stage.FIT),
            "confused_captions": CONFUSED_CAPTIONS,
            "confused_training": asdict(base_stage.CONFUSED_FIT),
        }
    )
    save_part("unet", base.unet.state_dict(), header, settings.weights)
    save_part("text_encoder", base.text_encoder.state_dict(), header, settings.weights)


def with_reconstructions(stage: Callable[[BuildSettings, Art, Reconstruct], None]) -> BuildStage:
    """Returns a stage of an evaluator, which also sees images that went through the autoencoder."""

    def build(art: Art, settings: BuildSettings) -> None:
        model, _ = stored_autoencoder(settings)

        @torch.no_grad()
        def reconstruct(images_BCHW: Tensor) -> Tensor:
            return (decode(model, posterior(model, images_BCHW * 2 - 1).mode()) / 2 + 0.5).clamp(0, 1)

        stage(settings, art, reconstruct)

    return build


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the chosen stages in order."""
    options = tyro.cli(Options, description=__doc__, args=arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    art = load_art(options.out / "art")
    settings = BuildSettings(options.out / "runs", options.weights, options.share)
    stages: dict[str, BuildStage] = {
        "autoencoder": build_autoencoder,
        "decoder": build_decoder,
        "base": build_base,
        "reward": with_reconstructions(build_reward),
        "validation_reward": with_reconstructions(build_validation_reward),
        "detectors": with_reconstructions(build_detectors),
    }
    for name, stage in stages.items():
        if options.only in ("all", name):
            stage(art, settings)


if __name__ == "__main__":
    main()
