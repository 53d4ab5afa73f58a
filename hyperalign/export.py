"""The generated weights of one sample as an ordinary LoRA file, for any loader. It uses no host.

B_aux B_hyper A_hyper A_aux is a product of rank r, so the weight change of a sample *is* a LoRA: nothing is
approximated. Unlike the hypernetwork, it does not depend on the timestep, the prompt and the noisy latent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import not_finite, save_atomically
from .delta import plain_lora
from .errors import HyperAlignError
from .hypernetwork import HyperNetwork
from .targets import LoraNames

ORIGIN_KEY = "hyperalign_export"
"""Header key of the JSON of `Origin`."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a LoRA was made from."""

    hypernetwork: str
    """Its file name, or its base and variant where the host does not provide the name."""
    prompt: str | None
    """None where the host provides embeddings only."""
    seed: int
    time: float
    """u in [0, 1] of the noisy latent that the hypernetwork received, 1 being pure noise."""
    strength: float


def check_time(time: float, has_samples: bool) -> None:
    """Raises HyperAlignError unless a noisy latent of this time can be made: below 1 this needs samples."""
    if not (math.isfinite(time) and 0.0 <= time <= 1.0):
        raise HyperAlignError(
            f"time is {time}; expected a number from 0, the finished image, to 1, pure noise. Use 1."
        )
    if time < 1.0 and not has_samples:
        raise HyperAlignError(
            f"time is {time}, but there is no image to put noise on; below 1 the hypernetwork needs a noisy "
            "image. Give the latents of a finished image, or use time 1."
        )


def lora_tensors(
    network: HyperNetwork,
    names: LoraNames,
    factors: tuple[Tensor, Tensor],
    strength: float = 1.0,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Tensor]:
    """Returns the file's tensors: for each target down (r, d_in) and up (d_out, r), and alpha = r.

    Args:
        network: where A_aux and B_aux are.
        names: the family's keys.
        factors: B_hyper (1, M, b, r) and A_hyper (1, M, r, a) of the sample, from `network.factors`.
        strength: multiplies the up matrices, so that the LoRA's own strength 1 is this one.
        dtype: of the matrices; they are multiplied in float32.

    Raises:
        HyperAlignError: more than one sample, or numbers too large for `dtype`.
    """
    b_hyper_BMDR, a_hyper_BMRA = (factor.float().cpu() for factor in factors)
    if b_hyper_BMDR.shape[0] != 1:
        raise HyperAlignError(
            f"Found weights of {b_hyper_BMDR.shape[0]} samples; a LoRA file holds those of one. "
            "Export one image and one prompt at a time."
        )
    tensors: dict[str, Tensor] = {}
    for index, target in enumerate(network.targets):
        a_aux, b_aux = (matrix.float().cpu() for matrix in network.aux(index))
        down_RI, up_OR = plain_lora(a_aux, b_aux, a_hyper_BMRA[0, index], b_hyper_BMDR[0, index])
        down_key, up_key, alpha_key = names.keys(target.name)
        tensors[down_key] = down_RI.to(dtype).contiguous()
        tensors[up_key] = (strength * up_OR).to(dtype).contiguous()
        if alpha_key is not None:
            tensors[alpha_key] = torch.tensor(float(network.config.rank), dtype=dtype)
    _check_range(tensors, dtype)
    return tensors


def save_lora(
    path: Path, tensors: dict[str, Tensor], origin: Origin, metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes the file atomically, its origin and a host's metadata in the header; returns its path."""
    known = {key: value for key, value in asdict(origin).items() if value is not None}
    save_atomically(tensors, path, {"format": "pt", **(metadata or {}), ORIGIN_KEY: json.dumps(known)})
    return path


def _check_range(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    if bad := not_finite(tensors):
        raise HyperAlignError(
            f"{len(bad)} tensors of the LoRA ({bad[0]}) are not finite in {dtype}. "
            "Lower the strength, or save in float32."
        )
