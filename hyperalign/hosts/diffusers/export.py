"""Saves the weights generated for one prompt, seed and time as a plain LoRA file, with diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ...checkpoint import HyperAlign, load
from ...errors import HyperAlignError
from ...export import Origin, check_time, lora_tensors, save_lora
from ...families.dit import TransformerSpec
from ...families.flux import FluxSpec
from ..forwards import owners
from .adapter import Adapter, latents_argument, spec_of
from .session import Session, denoiser_of


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
    """Saves a LoRA with the weights generated for one prompt, seed and time; returns its path.

    Args:
        pipe: a StableDiffusion, StableDiffusionXL, StableDiffusion3 or Flux pipeline.
        hyperalign: a hypernetwork's file, or the result of `hyperalign.checkpoint.load`.
        out: the `.safetensors` file.
        prompt: of the image; or give embeddings among the options.
        seed: of the noise, as `torch.Generator().manual_seed(seed)` for the pipeline.
        time: u in [0, 1] of the noisy latent that the hypernetwork receives, 1 being pure noise.
        strength: of HyperAlign that the LoRA's own strength 1 equals.
        samples: latents of an image, as the pipeline's `output_type="latent"` returns them, to which
            noise of `time` is added; needed below 1.
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
    perceived = adapter.perceive(call)
    factors = adapter.network.to(perceived.prompt_BC.device).factors(perceived)
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
    """Returns the model's arguments at a time: the first evaluation's at 1, with noisy samples below."""
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
    """Returns the arguments of the model's first evaluation, by running the pipeline until then."""
    base = denoiser_of(pipe)
    spec = spec_of(base)
    arguments: dict[str, Any] = {}

    def stop(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        # Pipelines of U-Nets give the latents and the timestep by position.
        arguments.update(zip(("sample", "timestep"), args, strict=False), **kwargs)
        raise _FirstCall

    if not isinstance(spec, FluxSpec):
        options = {**options, "guidance_scale": 1.0}  # FLUX's is an input of the model, not CFG
    scheduler = pipe.scheduler
    if not isinstance(spec, TransformerSpec):
        pipe.scheduler = _training_noise(scheduler)
    handle = base.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        generator = torch.Generator().manual_seed(seed)
        pipe(**options, num_inference_steps=1, generator=generator, output_type="latent")
    except _FirstCall:
        return {key: value for key, value in arguments.items() if key != "return_dict"}
    finally:
        handle.remove()
        pipe.scheduler = scheduler
        pipe.maybe_free_model_hooks()
    raise HyperAlignError(f"The {type(pipe).__name__} ended before its model ran; update HyperAlign.")


def _training_noise(scheduler: Any) -> Any:
    """Returns a scheduler with the noise schedule of training, which does not scale the sampled noise."""
    return DDIMScheduler.from_config(scheduler.config)
