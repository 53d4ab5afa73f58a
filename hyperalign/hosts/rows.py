"""Whose rows an attention's inputs are, where a patch has changed its batch. No host inside.

Patches repeat the whole batch, repeat each row next to itself, repeat some samples only, or cut each sample
into tiles. None says so, but their rows are copies: comparing them with the samples tells whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from ..errors import HyperAlignError

Candidates = Sequence[tuple[int, ...]]
"""Of each row, the samples whose copy it may be."""


class Rows:
    """What is known of the rows of the attention that runs."""

    def __init__(self) -> None:
        self._candidates: Candidates | None = None

    def forget(self) -> None:
        """Declares that the next layers get the samples themselves, as far as is known."""
        self._candidates = None

    def compare(self, rows_RNC: Tensor, samples_BNC: Tensor) -> None:
        """Finds whose copies the rows of the next layers are. Waits for the device."""
        self._candidates = _untraced_candidates(rows_RNC, samples_BNC)

    def samples_of(self, rows: int, weights_B: Tensor) -> list[int]:
        """Returns the sample of each of a layer's rows.

        Where it cannot be told, all samples that come into question must have the same weights.

        Args:
            rows: how many the layer got, not as many as there are samples.
            weights_B: the layer's weights of each sample.

        Raises:
            HyperAlignError: a row may be that of several samples with different weights.
        """
        samples, found = len(weights_B), self._candidates
        if found is None or len(found) != rows:
            found = [tuple(range(samples))] * rows
        for first, *others in set(found):
            if any(not torch.equal(weights_B[first], weights_B[other]) for other in others):
                raise HyperAlignError(
                    f"A model patch gives an adapted layer {rows} rows for {samples} samples, and they are "
                    "not copies or tiles of those: HyperAlign cannot tell which sample's weights each needs. "
                    "Remove that patch or HyperAlign from the model, or sample one image at a time at CFG 1."
                )
        return [first for first, *_ in found]


def candidates(rows_RNC: Tensor, samples_BNC: Tensor) -> Candidates:
    """Returns which samples each row may be a copy or a tile of; all of them where it is a copy of none."""
    ends_R2C = rows_RNC[:, [0, -1]]
    found_RB = torch.stack([_is_among(ends_R2C, sample_NC) for sample_NC in samples_BNC], dim=1)
    everyone = tuple(range(len(samples_BNC)))
    found = [
        tuple(index for index in everyone if matches[index]) or everyone for matches in found_RB.tolist()
    ]
    if all(len(each) == 1 for each in found):
        return found
    return _neighbouring_tiles(found, rows_RNC, samples_BNC) or found


_untraced_candidates = cast(Callable[..., Candidates], torch.compiler.disable(candidates))


def _is_among(tokens_RKC: Tensor, sample_NC: Tensor) -> Tensor:
    """Returns for each row whether a sample has all of its K tokens."""
    ways = [(tokens_R1C == sample_NC).all(-1).any(-1) for tokens_R1C in tokens_RKC.split(1, dim=1)]
    return torch.stack(ways).all(0)


def _neighbouring_tiles(
    found: Candidates, rows_RNC: Tensor, samples_BNC: Tensor
) -> list[tuple[int, ...]] | None:
    """Returns the order of tiles of which each sample's follow one after the other, if that is theirs.

    Samples of the same content, such as both prompts' before the first text attention, have the same tiles.
    If neighbours are different tiles, they are those of one sample.
    """
    tiles, rest = divmod(len(rows_RNC), len(samples_BNC))
    if rest or rows_RNC[0].numel() * tiles != samples_BNC[0].numel():
        return None
    order = [row // tiles for row in range(len(rows_RNC))]
    if not all(sample in each for sample, each in zip(order, found, strict=True)):
        return None
    first_BTC = rows_RNC[:, 0].unflatten(0, (-1, tiles))
    same_BTT = (first_BTC[:, :, None] == first_BTC[:, None]).all(-1)
    return [(sample,) for sample in order] if int(same_BTT.sum()) == len(order) else None
