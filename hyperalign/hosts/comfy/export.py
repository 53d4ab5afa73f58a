"""A hypernetwork's weights for one prompt, seed and time as a LoRA file in the host's output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import folder_paths
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import HyperAlignError
from ...export import Origin, check_time, lora_tensors, save_lora
from ...families.dit import TransformerSpec
from .model import HostHyperAlign, apply, check_strength, spec_of
from .sampling import start_of

DEFAULT_PREFIX = "loras/hyperalign"
"""The host offers output/loras in Load LoRA as well as models/loras."""


def export_lora(
    patcher: ModelPatcher,
    loaded: HostHyperAlign,
    positive: Any,
    latent: Mapping[str, Any],
    *,
    seed: int,
    time: float,
    strength: float,
    filename_prefix: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Saves a LoRA in the output folder; returns its path.

    Args:
        patcher: the base MODEL; it is not changed.
        loaded: a hypernetwork from `model.load`.
        positive: CONDITIONING of one prompt.
        latent: LATENT; its first sample gives the size and, below time 1, the clean latent.
        seed: of the noise, as for KSampler.
        time: u in [0, 1] at which the weights are generated, 1 being pure noise.
        strength: HyperAlign strength that corresponds to LoRA strength 1.
        filename_prefix: path in the output folder; a number is appended.
        metadata: further header entries.
        dtype: of the file's matrices.

    Raises:
        HyperAlignError: a value out of range, several prompts, an empty LATENT below time 1, or a
            hypernetwork for another base model.
    """
    check_strength(strength)
    check_time(time, has_samples=bool(torch.count_nonzero(latent["samples"])))
    if len(positive) != 1:
        raise HyperAlignError(
            f"The CONDITIONING holds {len(positive)} prompts; expected 1, because each prompt has its own "
            "weights. Export one prompt at a time."
        )
    clean_BCHW = start_of(patcher, {**latent, "samples": latent["samples"][:1]})
    folder, name, number, *_ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    factors = factors_at(patcher, loaded, positive, clean_BCHW, seed, time)
    names = spec_of(patcher.model).lora_names
    tensors = lora_tensors(loaded.hyperalign.network, names, factors, strength, dtype)
    header = loaded.header
    # The host's CONDITIONING does not contain its text; the workflow in `metadata` does.
    origin = Origin(f"{header.family} {header.schedule.variant}", None, seed, time, strength)
    return save_lora(Path(folder) / f"{name}_{number:05}_.safetensors", tensors, origin, metadata)


def factors_at(
    patcher: ModelPatcher,
    loaded: HostHyperAlign,
    positive: Any,
    clean_BCHW: Tensor,
    seed: int,
    time: float,
) -> tuple[Tensor, Tensor]:
    """Returns B_hyper (1, M, b, r) and A_hyper (1, M, r, a) that the hypernetwork generates at a time.

    ComfyUI samples one step with the aligned MODEL, so that conditioning, noise and memory management are
    those of any other run.

    Raises:
        HyperAlignError: the prompt is not active at that time.
    """
    aligned = apply(patcher, loaded)
    sampling: Any = aligned.get_model_object("model_sampling")
    spec = spec_of(patcher.model)
    is_flow = isinstance(spec, TransformerSpec)
    t = torch.tensor(float(round(time * spec.last_timestep)))
    sigmas = torch.tensor([time if is_flow else float(sampling.sigma(t)), 0.0])
    noise = comfy.sample.prepare_noise(clean_BCHW, seed)
    guider = comfy.samplers.CFGGuider(aligned)
    guider.inner_set_conds({"positive": positive})
    network = loaded.hyperalign.network
    seen: list[tuple[Tensor, Tensor]] = []
    handle = network.register_forward_pre_hook(lambda _, inputs: seen.append(network.factors(inputs[0])))
    try:
        # At time 1 from zeros, else the host keeps a remainder of the image.
        start = torch.zeros_like(clean_BCHW) if time == 1.0 else clean_BCHW
        euler = comfy.samplers.sampler_object("euler")
        guider.sample(noise, start, euler, sigmas, disable_pbar=True, seed=seed)
    finally:
        handle.remove()
    if not seen:
        raise HyperAlignError(
            f"The prompt is not active at time {time}; expected CONDITIONING for all of sampling. "
            "Remove its time range, or choose a time inside it."
        )
    return seen[0]


def workflow_metadata(prompt: Any, extra_pnginfo: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns the workflow as the host's own nodes store it in the files they save."""
    if args.disable_metadata:
        return {}
    entries = {"prompt": prompt, **(extra_pnginfo or {})}
    return {key: json.dumps(value) for key, value in entries.items() if value is not None}
