"""Joining and indexing the host's batches: IMAGE, LATENT, MASK and lists of seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import HyperAlignError

Latent = dict[str, Any]


def joined(name: str, batches: Sequence[Tensor]) -> Tensor:
    """Returns several batches as one. Raises HyperAlignError if their sizes differ."""
    if len({batch.shape[1:] for batch in batches}) > 1:
        sizes = ", ".join(" x ".join(map(str, batch.shape[1:])) for batch in batches)
        raise HyperAlignError(
            f"The {name} have different sizes ({sizes}); expected one size. Scale them to one size first."
        )
    return torch.cat(list(batches))


def paired(first: Tensor, second: Tensor) -> Tensor:
    """Returns two batches of the same shape as one. Raises HyperAlignError if the shapes differ."""
    if first.shape != second.shape:
        raise HyperAlignError(
            f"Found images of shapes {tuple(first.shape)} and {tuple(second.shape)}; expected "
            "the same number of images of the same size. Generate both with the same settings."
        )
    return torch.cat([first, second])


def joined_latents(latents: Sequence[Latent]) -> Latent:
    """Returns several LATENTs as one; entries besides samples and noise_mask are those of the first."""
    if len(latents) == 1:
        return latents[0]
    joint: Latent = dict(latents[0]) | {"samples": joined("latents", [part["samples"] for part in latents])}
    joint.pop("batch_index", None)
    if all(part.get("noise_mask") is not None for part in latents):
        masks = [_one_per_sample(part["noise_mask"], len(part["samples"])) for part in latents]
        joint["noise_mask"] = joined("noise masks", masks)
    else:
        joint.pop("noise_mask", None)
    return joint


def pick_latents(latent: Latent, indices: Sequence[int], count: int) -> Latent:
    """Returns samples of a LATENT with their masks and batch indices. Raises as `pick`."""
    picked = dict(latent) | {"samples": pick("latents", latent["samples"], indices, count)}
    if latent.get("noise_mask") is not None:
        picked["noise_mask"] = pick_masks(latent["noise_mask"], indices, count)
    if latent.get("batch_index") is not None:
        picked["batch_index"] = [latent["batch_index"][index] for index in indices]
    return picked


def pick(name: str, batch: Tensor, indices: Sequence[int], count: int) -> Tensor:
    """Returns some of the `count` samples of a batch. Raises HyperAlignError on any other batch size."""
    _check_count(name, len(batch), count)
    return batch[list(indices)]


def pick_masks(masks: Tensor, indices: Sequence[int], count: int) -> Tensor:
    """Returns some of `count` masks; a single mask applies to all samples. Raises as `pick`."""
    return pick("masks", _one_per_sample(masks, count), indices, count)


def pick_seeds(seeds: Sequence[int], indices: Sequence[int], count: int) -> list[int]:
    """Returns some of `count` seeds; a single seed applies to all samples. Raises as `pick`."""
    every = list(seeds) * count if len(seeds) == 1 else list(seeds)
    _check_count("seeds", len(every), count)
    return [every[index] for index in indices]


def _one_per_sample(masks: Tensor, count: int) -> Tensor:
    """Returns `count` masks if there is a single one, which serves its whole batch in the host."""
    return masks.expand(count, *masks.shape[1:]) if len(masks) == 1 else masks


def _check_count(name: str, found: int, count: int) -> None:
    if found != count:
        raise HyperAlignError(
            f"Found {found} {name} and {count} scores; expected the same number of both. Connect the {name} "
            "of the scored images."
        )
