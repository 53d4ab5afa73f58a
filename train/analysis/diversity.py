"""Figure 12: images of one prompt from several noises, for the base model and for hypernetworks.

The paper shows that reward fine-tuning lets them collapse to one style or identity, and that HyperAlign keeps
the base model's variety. Beside the images stands a number: the diversity of a prompt, the mean of 1 - cosine
over all pairs of its images, in an embedding that no training has optimised. Every method starts from the
same noises.

Shape letters: P prompts, S seeds, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperalign.checkpoint import HyperAlign
from hyperalign.tiny.geneval import diversity
from hyperalign.trace import rounded
from train.analysis.statistics import band, standard_error
from train.models.base import Base, PromptEncoder
from train.models.image_embedding import Embed
from train.sampling import sample

LEAST_PROMPTS = 3
SHOWN_SIDE = 384
"""Pixels of an image in the figure, at most."""


@dataclass(frozen=True, slots=True)
class Diversity:
    """What one method generated."""

    name: str
    values_P: Tensor
    """Diversity of each prompt."""
    shown_RS3HW: Tensor
    """The images of the first prompts."""
    not_finite: float
    """Share of images that were not finite and count as grey ones."""


def diversity_of(
    name: str,
    base: Base,
    encoder: PromptEncoder,
    hyperalign: HyperAlign | None,
    embed: Embed,
    prompts: Sequence[str],
    *,
    seeds: int,
    steps: int,
    guidance_scale: float,
    batch: int,
    first_seed: int = 0,
    shown: int = 3,
    progress: Callable[[int], object] = lambda _: None,
) -> Diversity:
    """Samples every prompt at every seed.

    Args:
        name: of the method.
        base: the base model.
        encoder: has the conditions of the prompts.
        hyperalign: the hypernetwork, on the device of the base model; None samples the base model.
        embed: its embeddings measure the diversity.
        prompts: the list; a prompt's place in it and a seed decide a noise.
        seeds: images of each prompt, 2 or more.
        steps: sampling steps.
        guidance_scale: of classifier-free guidance.
        batch: images to sample at once.
        first_seed: the first of the seeds, which follow one another.
        shown: how many prompts' images to keep.
        progress: called with the number of images after each part.
    """
    values, kept, not_finite = list[Tensor](), list[Tensor](), 0.0
    at_once = max(1, batch // seeds)
    for first in range(0, len(prompts), at_once):
        chunk = prompts[first : first + at_once]
        made = sample(
            base, encoder, hyperalign, chunk, indices=range(first, first + len(chunk)),
            seeds=range(first_seed, first_seed + seeds), steps=steps, guidance_scale=guidance_scale,
            batch=batch,
        )  # fmt: skip
        flat = made.images.flatten(0, 1)
        with torch.no_grad():
            parts = [embed(part.to(base.device)).cpu() for part in flat.split(batch)]
        values.append(diversity(torch.cat(parts).unflatten(0, made.images.shape[:2])))
        kept.extend(_smaller(row) for row in made.images[: max(0, shown - first)])
        not_finite += made.not_finite * len(chunk) / len(prompts)
        progress(len(flat))
    return Diversity(name, torch.cat(values), torch.stack(kept), not_finite)


def _smaller(images_S3HW: Tensor) -> Tensor:
    """Returns images of at most SHOWN_SIDE pixels."""
    if max(images_S3HW.shape[-2:]) <= SHOWN_SIDE:
        return images_S3HW.clone()
    scale = SHOWN_SIDE / max(images_S3HW.shape[-2:])
    return F.interpolate(images_S3HW, scale_factor=scale, mode="bilinear", antialias=True).clamp(0.0, 1.0)


def as_json(methods: Sequence[Diversity]) -> list[dict[str, Any]]:
    """Returns each method's diversity as JSON types, with its ratio to that of the first method, the base's.

    The ratio is that of the means; the difference is paired by prompt.
    """
    base_P = methods[0].values_P
    rows: list[dict[str, Any]] = []
    for method in methods:
        values_P = method.values_P
        spread = {name: values[0] for name, values in band(values_P[None]).as_json().items()}
        row: dict[str, Any] = {"method": method.name, "diversity": spread, "not_finite": method.not_finite}
        if method is not methods[0]:
            pairs_P2 = torch.stack([values_P, base_P], dim=1)
            row["ratio_to_base"] = _with_error(_ratio, pairs_P2)
            row["difference_from_base"] = _with_error(_difference, pairs_P2)
        rows.append(row | {"of_each_prompt": rounded(values_P)})
    return rows


def _ratio(pairs_P2: Tensor) -> Tensor:
    return pairs_P2[:, 0].mean() / pairs_P2[:, 1].mean()


def _difference(pairs_P2: Tensor) -> Tensor:
    return (pairs_P2[:, 0] - pairs_P2[:, 1]).mean()


def _with_error(statistic: Callable[[Tensor], Tensor], pairs_P2: Tensor) -> dict[str, Any]:
    error = standard_error(lambda chosen: statistic(pairs_P2[[*chosen]]), len(pairs_P2))
    return {"value": rounded(statistic(pairs_P2)), "standard_error": rounded(error)}
