r"""Writes a hypernetwork's weights for one prompt, seed and time into a plain LoRA file, with diffusers.

python -m hyperalign export --pipeline models/sd15 --hypernetwork mine.safetensors \
    --prompt "a red heart" --seed 5 --out heart_lora.safetensors

The file loads in ComfyUI's Load LoRA and in diffusers' load_lora_weights.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import load_image
from torch import Tensor

from ..checkpoint import HyperAlign, load, read_header
from ..errors import HyperAlignError
from ..export import Origin, check_time, lora_tensors, save_lora
from ..families.dit import TransformerSpec
from ..families.flux import FluxSpec
from ..hosts.diffusers.adapter import Adapter, latents_argument, spec_of
from ..hosts.diffusers.session import Session, denoiser_of
from ..hosts.forwards import owners

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class _FirstCall(Exception):
    """Ends a pipeline at its first model evaluation."""


@torch.no_grad()
def export_lora(
    pipe: Any,
    hyperalign: HyperAlign | Path | str,
    out: Path | str,
    *,
    prompt: str | None = None,
    seed: int = 0,
    time: float = 1.0,
    strength: float = 1.0,
    samples: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    **options: Any,
) -> Path:
    """Writes a LoRA with the weights for one prompt, seed and time; returns its path.

    Args:
        pipe: a StableDiffusion, StableDiffusionXL, StableDiffusion3 or Flux pipeline.
        hyperalign: a hypernetwork's file, or what `hyperalign.checkpoint.load` returned.
        out: the `.safetensors` file to write.
        prompt: what the image shows; embeddings may be given among the options instead.
        seed: of the noise, as `torch.Generator().manual_seed(seed)` for the pipeline.
        time: u in [0, 1] at which the hypernetwork looks, 1 being pure noise.
        strength: what the LoRA's own strength 1 stands for.
        samples: latents as the pipeline's `output_type="latent"` gives them, noised to `time`; needed
            below 1.
        dtype: of the file's matrices.
        options: further arguments of the pipeline, such as `height` and `width`.

    Raises:
        HyperAlignError: a time out of range or without samples, another base model, or several prompts.
    """
    check_time(time, has_samples=samples is not None)
    if not math.isfinite(strength):
        raise HyperAlignError(f"strength is {strength}; expected a number, 1 as trained.")
    if any(isinstance(owner, Session) for owner in owners(denoiser_of(pipe))):
        raise HyperAlignError(
            "The pipeline has HyperAlign attached; expected the base model. Detach it first."
        )
    name = "" if isinstance(hyperalign, HyperAlign) else Path(hyperalign).name
    loaded = hyperalign if isinstance(hyperalign, HyperAlign) else load(Path(hyperalign))
    adapter = Adapter(denoiser_of(pipe), loaded)
    call = _call_at(pipe, time, samples, {"prompt": prompt, **options}, seed)
    features = adapter.perceive(call)
    factors = adapter.network.to(features[0].device).factors(features)
    spec = spec_of(adapter.base)
    tensors = lora_tensors(adapter.network, spec.lora_names, factors, strength, dtype)
    return save_lora(Path(out), tensors, Origin(name or spec.family, prompt, seed, time, strength))


@torch.no_grad()
def encode(pipe: Any, image: Any, height: int, width: int) -> Tensor:
    """Returns a PIL image as the pipeline's latents, for `samples`."""
    vae: Any = pipe.vae
    pixels_BCHW = pipe.image_processor.preprocess(image, height=height, width=width)
    kept = vae.dtype
    vae.to(torch.float32)  # SDXL's overflows in half precision
    latents_BCHW = vae.encode(pixels_BCHW.to(vae.device, torch.float32)).latent_dist.mode()
    vae.to(kept)
    scaled_BCHW = (latents_BCHW - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    if not isinstance(spec_of(denoiser_of(pipe)), FluxSpec):
        return scaled_BCHW
    # FLUX packs squares of 2 x 2 cells into tokens.
    squares = scaled_BCHW.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    return squares.flatten(3).flatten(1, 2)


def _call_at(
    pipe: Any, time: float, samples: Tensor | None, options: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Returns the model's arguments at a time: those of the pipeline's first evaluation, noised otherwise."""
    base = denoiser_of(pipe)
    spec = spec_of(base)
    is_flow = isinstance(spec, TransformerSpec)
    t = time * spec.last_timestep if is_flow else round(time * spec.last_timestep)
    call = _first_call(pipe, options, seed)
    key = latents_argument(base)
    noise = call[key]
    if time < 1.0 and samples is not None:
        clean = samples.to(noise)
        if is_flow:
            call[key] = (1 - time) * clean + time * noise
        else:
            times = torch.tensor([t], device=noise.device)
            call[key] = _training_noise(pipe.scheduler).add_noise(clean, noise, times)
    call["timestep"] = torch.full_like(torch.as_tensor(call["timestep"]), t)
    return call


def _first_call(pipe: Any, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Returns the arguments of the model's first evaluation, which the pipeline alone knows to make."""
    base = denoiser_of(pipe)
    spec = spec_of(base)
    seen: dict[str, Any] = {}

    def stop(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        # By position come the latents and the timestep of U-Nets.
        seen.update(zip(("sample", "timestep"), args, strict=False), **kwargs)
        raise _FirstCall

    if not isinstance(spec, FluxSpec):
        options = {**options, "guidance_scale": 1.0}  # FLUX's is an input of the model, not a second row
    scheduler = pipe.scheduler
    if not isinstance(spec, TransformerSpec):
        pipe.scheduler = _training_noise(scheduler)
    handle = base.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        generator = torch.Generator().manual_seed(seed)
        pipe(**options, num_inference_steps=1, generator=generator, output_type="latent")
    except _FirstCall:
        return {key: value for key, value in seen.items() if key != "return_dict"}
    finally:
        handle.remove()
        pipe.scheduler = scheduler
        pipe.maybe_free_model_hooks()
    raise HyperAlignError(f"The {type(pipe).__name__} ended before its model ran; update HyperAlign.")


def _training_noise(scheduler: Any) -> Any:
    """Returns a scheduler with the noise of training, which hands on the noise as it was drawn."""
    return DDIMScheduler.from_config(scheduler.config)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--pipeline", type=Path, required=True, help="folder of the base model, as diffusers saves it"
    )
    parser.add_argument("--hypernetwork", type=Path, required=True, help="the hypernetwork's file")
    parser.add_argument("--prompt", required=True, help="what the image shows")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (default: %(default)s)")
    parser.add_argument(
        "--time", type=float, default=1.0,
        help="when the hypernetwork looks: 1 is pure noise, 0 the finished image (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--image", type=Path, help="a finished image, noised to --time; needed below 1")
    parser.add_argument(
        "--strength", type=float, default=1.0,
        help="what the LoRA's own strength 1 stands for; 1 as trained (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--height", type=int, help="of the image in pixels (default: the model's own)")
    parser.add_argument("--width", type=int, help="of the image in pixels (default: the model's own)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="of the file's matrices (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    return parser.parse_args(arguments)


def export(options: argparse.Namespace) -> Path:
    """Loads the pipeline and writes the LoRA; returns its path. Raises HyperAlignError."""
    check_time(options.time, has_samples=options.image is not None)
    header = read_header(options.hypernetwork)  # before minutes of loading
    if not (options.pipeline / "model_index.json").is_file():
        raise HyperAlignError(
            f"{options.pipeline} is no folder of a diffusers pipeline (no model_index.json in it). "
            f"Give that of the {header.family} base model, as save_pretrained or `hf download` make it."
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


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        path = export(parse(sys.argv[1:] if arguments is None else arguments))
    except HyperAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
