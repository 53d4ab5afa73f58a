"""Where the image looks at each token: cross-attention maps of a U-Net, with their gradient.

They are computed from what the layers project, beside the model's own attention, so that it may run with any
kernel and recompute its activations.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperalign.errors import HyperAlignError
from hyperalign.hosts.forwards import watched
from train.generation.entities import Pairs
from train.rollout import Denoiser

CELLS_PER_PLACE = 4
"""Latent cells along one side of a place of a map: 16 x 16 places for SD 1.5, 32 x 32 for SDXL, DyMO's."""


class AttendingDenoiser(Denoiser):
    """A denoiser that keeps the maps of its last call."""

    maps_BQL: Tensor
    """Attention of each place Q of an image to each token L of its prompt, mean of heads and layers."""

    def outputs(self, x: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
        """Returns the model's outputs, as `Denoiser`. Raises HyperAlignError if it has no such maps."""
        height, width = x.shape[-2:]
        places = math.ceil(height / CELLS_PER_PLACE) * math.ceil(width / CELLS_PER_PLACE)
        with recorded(self.base.backbone) as projections:
            found = super().outputs(x, t)
        maps = [
            attention(layer, queries[0][: len(x)], keys[0][: len(x)])  # not those of the empty prompts
            for layer, queries, keys in projections
            if queries[0].shape[1] == places
        ]
        if not maps:
            raise HyperAlignError(
                f"The base model has no cross-attention of {places} places; expected a U-Net that halves its "
                "latent twice. Take --dymo.semantic off."
            )
        self.maps_BQL = torch.stack(maps).mean(dim=0)
        return found


@contextlib.contextmanager
def recorded(backbone: nn.Module) -> Iterator[list[tuple[nn.Module, list[Tensor], list[Tensor]]]]:
    """Yields each cross-attention with its queries and keys (B, N, C), one for each call meanwhile."""
    layers: dict[str, Any] = {name: m for name, m in backbone.named_modules() if name.endswith(".attn2")}
    with contextlib.ExitStack() as stack:
        found: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = []
        for layer in layers.values():
            queries, keys = list[Tensor](), list[Tensor]()
            stack.enter_context(watched(layer.to_q, queries.append))
            stack.enter_context(watched(layer.to_k, keys.append))
            found.append((layer, queries, keys))
        yield found


def attention(layer: Any, query_BQC: Tensor, key_BLC: Tensor) -> Tensor:
    """Returns softmax(scale q k^T) in float32, mean of the heads, (B, Q, L)."""

    def split(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (layer.heads, -1)).transpose(1, 2).float()

    with torch.autocast(query_BQC.device.type, enabled=False):
        logits = layer.scale * split(query_BQC) @ split(key_BLC).transpose(-1, -2)
        return logits.softmax(dim=-1).mean(dim=1)


def semantic_loss(maps_BQL: Tensor, pairs: Pairs) -> Tensor:
    """Returns the mean distance of tokens that belong together less that of tokens apart, (B,).

    The distance of two tokens is 1 - cos of their maps. Tokens past the context's end count for nothing.
    """
    unit_BQL = F.normalize(maps_BQL, dim=1)

    def distance(chosen: tuple[tuple[int, int], ...]) -> Tensor:
        inside = [pair for pair in chosen if max(pair) < maps_BQL.shape[2]]
        if not inside:
            return maps_BQL.sum(dim=(1, 2)) * 0.0
        one, other = (unit_BQL[:, :, list(places)] for places in zip(*inside, strict=True))
        return (1.0 - (one * other).sum(dim=1)).mean(dim=1)

    return distance(pairs.together) - distance(pairs.apart)
