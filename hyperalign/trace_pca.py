"""How generated weights differ over prompts and seeds, step by step: the paper's Fig 9.

Shape letters as in `trace`; N points, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import HyperAlignError
from .trace import Trace, generated_at
from .trace_energy import image_shares

STEPS = 6


@dataclass(frozen=True, slots=True)
class Spread:
    """The weights of several images in the plane of their first two principal components."""

    evaluations: tuple[int, ...]
    """Indices of the shown steps, S."""
    times: tuple[float, ...]
    """u of each step."""
    places_SN2: Tensor
    """Coordinates of each step and point; all steps share one plane."""
    traces: tuple[int, ...]
    """The index of each point's trace, N; the samples of one batch are points of one trace."""
    explained: tuple[float, float]
    """Fraction of the variance that each component explains."""
    spreads: tuple[float, ...]
    """Of each step: root mean square distance of the weights from their mean, relative to their length."""
    shares: dict[str, float]
    """Of the weights' energy: what is the same for all, differs by image, by time, and by both together."""

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON types."""
        return {
            "evaluations": [evaluation + 1 for evaluation in self.evaluations],
            "u": [round(time, 6) for time in self.times],
            "explained": [round(part, 6) for part in self.explained],
            "spread": [round(spread, 6) for spread in self.spreads],
            "shares": {part: float(f"{share:.6g}") for part, share in self.shares.items()},
            "trace_of_point": [*self.traces],
            "points": [
                [[float(f"{x:.6g}") for x in place] for place in step] for step in self.places_SN2.tolist()
            ],
        }


def spread_of(traces: Sequence[Trace], steps: int = STEPS) -> Spread:
    """Returns the points of the shown samples of several runs at a few steps.

    Args:
        traces: of one hypernetwork, with the same steps.
        steps: how many steps to show at most, spread evenly over those at which weights were generated.

    Raises:
        HyperAlignError: traces of different hypernetworks or steps, or fewer than 3 points.
    """
    _check_alike(traces)
    evaluations = _evenly_spaced(generated_at(traces[0]), steps)
    parts = [_points(trace, evaluations) for trace in traces]
    points_SNF = torch.cat(parts, dim=1)
    places_PC, explained = pca(points_SNF.flatten(0, 1))
    return Spread(
        evaluations=tuple(evaluations),
        times=tuple(traces[0].times[evaluation] for evaluation in evaluations),
        places_SN2=places_PC.unflatten(0, points_SNF.shape[:2]),
        traces=tuple(index for index, part in enumerate(parts) for _ in range(part.shape[1])),
        explained=(float(explained[0]), float(explained[1])),
        spreads=tuple(relative_spread(points_NF) for points_NF in points_SNF),
        shares=image_shares(traces),
    )


def pca(points_NF: Tensor, components: int = 2) -> tuple[Tensor, Tensor]:
    """Returns the first principal coordinates (N, components) and the fraction of variance of each.

    They are computed from the N x N Gram matrix of the centred points, which is small even where F is large.
    The sign of a coordinate makes its greatest absolute value positive.

    Raises HyperAlignError for fewer than 3 points.
    """
    if len(points_NF) < 3:
        raise HyperAlignError(
            f"Found {len(points_NF)} points; expected at least 3. Generate several images: a batch, or "
            "traces of several prompts or seeds."
        )
    centred_NF = points_NF.float() - points_NF.float().mean(dim=0)
    values_N, vectors_NN = torch.linalg.eigh((centred_NF @ centred_NF.T).double())
    values_N, vectors_NN = values_N.clamp_min(0).flip(0), vectors_NN.flip(1)
    places_NC = vectors_NN[:, :components] * values_N[:components].sqrt()
    greatest_C = places_NC[places_NC.abs().argmax(dim=0), torch.arange(components)]
    explained_C = values_N[:components] / values_N.sum().clamp_min(1e-30)
    return (places_NC * torch.where(greatest_C < 0, -1.0, 1.0)).float(), explained_C.float()


def relative_spread(points_NF: Tensor) -> float:
    """Returns the root mean square distance of points from their mean, relative to that from the origin."""
    away = (points_NF - points_NF.mean(dim=0)).square().sum()
    return float((away / points_NF.square().sum().clamp_min(1e-30)).sqrt())


def _points(trace: Trace, evaluations: Sequence[int]) -> Tensor:
    """Returns the shown samples' weights at some evaluations (evaluations, samples, M F)."""
    parts: list[Tensor] = []
    for track in trace.shown:
        used = [track.generation_used[evaluation] for evaluation in evaluations]
        if -1 in used:
            raise HyperAlignError(
                "The regions of an image did not use weights at the same steps, so their weights cannot be "
                "compared. Use one prompt for the whole image."
            )
        parts.append(track.weights_GRMF[used].flatten(2))
    return torch.cat(parts, dim=1)


def _evenly_spaced(items: Sequence[int], count: int) -> list[int]:
    """Returns at most `count` items at even distances, with the first and the last."""
    if len(items) <= count:
        return [*items]
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _check_alike(traces: Sequence[Trace]) -> None:
    first = traces[0]
    for number, trace in enumerate(traces[1:], start=2):
        widths = [item.shown[0].weights_GRMF.shape[2:] for item in (first, trace)]
        if trace.targets != first.targets or widths[0] != widths[1]:
            raise HyperAlignError(
                f"Trace {number} is of another hypernetwork than trace 1; their weights cannot be compared. "
                "Connect traces of one hypernetwork."
            )
        if len(trace.times) != len(first.times) or generated_at(trace) != generated_at(first):
            raise HyperAlignError(
                f"Trace {number} has {len(trace.times)} evaluations and {len(generated_at(trace))} "
                f"generations, trace 1 has {len(first.times)} and {len(generated_at(first))}, or at "
                "other steps. Generate all with the same steps, sampler, scheduler and variant."
            )
