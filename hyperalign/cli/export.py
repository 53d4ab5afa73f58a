r"""Saves the weights that a hypernetwork generates for one prompt, seed and time as a plain LoRA file.

python -m hyperalign export --pipeline models/sd15 --hypernetwork mine.safetensors \
    --prompt "a red heart" --seed 5 --out heart_lora.safetensors

ComfyUI's Load LoRA and diffusers' load_lora_weights read the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image

from ..checkpoint import read_header
from ..errors import HyperAlignError
from ..export import check_time
from ..hosts.diffusers.export import encode, export_lora
from .common.arguments import DTYPES, command_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status. Raises HyperAlignError."""
    print(f"Wrote {run(parse(arguments))}")
    return 0


def run(options: argparse.Namespace) -> Path:
    """Loads the pipeline and saves the LoRA; returns its path. Raises HyperAlignError."""
    check_time(options.time, has_samples=options.image is not None)
    header = read_header(options.hypernetwork)  # before minutes of loading
    if not (options.pipeline / "model_index.json").is_file():
        raise HyperAlignError(
            f"{options.pipeline} is no folder of a diffusers pipeline (no model_index.json in it). "
            f"Give that of the {header.family} base model, made by save_pretrained or `hf download`."
        )
    if options.image is not None and not options.image.is_file():
        raise HyperAlignError(f"There is no image {options.image}. Give the path of a finished image.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe: Any = DiffusionPipeline.from_pretrained(options.pipeline, torch_dtype=dtype, local_files_only=True)
    pipe.to(device)
    size = {key: value for key in ("height", "width") if (value := getattr(options, key)) is not None}
    samples = None
    if options.image is not None:
        image = load_image(str(options.image))
        full = {"height": image.height, "width": image.width} | size
        size = {key: value // 16 * 16 for key, value in full.items()}
        samples = encode(pipe, image, **size)
    return export_lora(
        pipe, options.hypernetwork, options.out, prompt=options.prompt, seed=options.seed, time=options.time,
        strength=options.strength, samples=samples, dtype=DTYPES[options.dtype], **size,
    )  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of a command line; ends the process on a wrong one."""
    parser = command_parser("export", __doc__)
    add = parser.add_argument
    add("--pipeline", type=Path, required=True, help="folder of the base model, as diffusers saves it")
    add("--hypernetwork", type=Path, required=True, help="the hypernetwork's file")
    add("--prompt", required=True, help="of the image")
    add("--seed", type=int, default=0, help="of the initial noise (default: %(default)s)")
    add("--time", type=float, default=1.0,
        help="noise level that the weights are generated at: 1 is pure noise, 0 the finished image "
        "(default: %(default)s)")  # fmt: skip
    add("--image", type=Path, help="a finished image, to which noise of --time is added; needed below 1")
    add("--strength", type=float, default=1.0,
        help="of HyperAlign that the LoRA's own strength 1 equals (default: %(default)s, as "
        "trained)")  # fmt: skip
    add("--height", type=int, help="of the image in pixels (default: the model's own)")
    add("--width", type=int, help="of the image in pixels (default: the model's own)")
    add("--dtype", choices=DTYPES, default="float16", help="of the file's matrices (default: %(default)s)")
    add("--out", type=Path, required=True, help="the .safetensors file to write")
    return parser.parse_args(arguments)
