"""Rows of the host's batches: of IMAGE, LATENT, MASK and of lists of seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import HyperAlignError

Latent = dict[str, Any]


def joined(name: str, batches: Sequence[Tensor]) -> Tensor:
    """Returns several batches as one. Raises HyperAlignError where their sizes differ."""
    if len({batch.shape[1:] for batch in batches}) > 1:
        sizes = ", ".join(" x ".join(map(str, batch.shape[1:])) for batch in batches)
        raise HyperAlignError(
            f"The {name} have different sizes ({sizes}); expected one size. Scale them to one size first."
        )
    return torch.cat(list(batches))


def paired(first: Tensor, second: Tensor) -> Tensor:
    """Returns two batches of the same form as one. Raises HyperAlignError where they differ."""
    if first.shape != second.shape:
        raise HyperAlignError(
            f"Found images of shapes {tuple(first.shape)} and {tuple(second.shape)}; expected as many "
            "of the same size. Draw both with the same settings."
        )
    return torch.cat([first, second])


def joined_latents(latents: Sequence[Latent]) -> Latent:
    """Returns several LATENTs as one; of other entries than samples and noise_mask the first counts."""
    if len(latents) == 1:
        return latents[0]
    whole: Latent = dict(latents[0]) | {"samples": joined("latents", [part["samples"] for part in latents])}
    whole.pop("batch_index", None)
    if all("noise_mask" in part for part in latents):
        whole["noise_mask"] = joined("noise masks", [part["noise_mask"] for part in latents])
    else:
        whole.pop("noise_mask", None)
    return whole


def pick_latents(latent: Latent, indices: Sequence[int], count: int) -> Latent:
    """Returns rows of a LATENT with their masks and batch indices. Raises as `pick`."""
    rows = dict(latent) | {"samples": pick("latents", latent["samples"], indices, count)}
    if latent.get("noise_mask") is not None:
        rows["noise_mask"] = pick_masks(latent["noise_mask"], indices, count)
    if latent.get("batch_index") is not None:
        rows["batch_index"] = [latent["batch_index"][index] for index in indices]
    return rows


def pick(name: str, rows: Tensor, indices: Sequence[int], count: int) -> Tensor:
    """Returns some rows of `count`. Raises HyperAlignError on another number."""
    _check_count(name, len(rows), count)
    return rows[list(indices)]


def pick_masks(masks: Tensor, indices: Sequence[int], count: int) -> Tensor:
    """Returns some masks of `count`; a single one serves all. Raises as `pick`."""
    every = masks.expand(count, *masks.shape[1:]) if len(masks) == 1 else masks
    return pick("masks", every, indices, count)


def pick_seeds(seeds: Sequence[int], indices: Sequence[int], count: int) -> list[int]:
    """Returns some seeds of `count`; a single one serves all. Raises as `pick`."""
    every = list(seeds) * count if len(seeds) == 1 else list(seeds)
    _check_count("seeds", len(every), count)
    return [every[index] for index in indices]


def _check_count(name: str, found: int, count: int) -> None:
    if found != count:
        raise HyperAlignError(
            f"Found {found} {name} and {count} scores; expected as many of both. Connect what the scores "
            "were made of."
        )
