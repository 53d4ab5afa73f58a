"""The weights that a hypernetwork generated during one run, and how they changed: the paper's Fig 8.

The change of a layer is dW = B_aux K A_aux. Its inner products need no dW: with G_a = A_aux A_aux^T and
G_b = B_aux^T B_aux, <dW, dW'> = tr(K^T G_b K' G_a), so the b x a coordinates G_b^(1/2) K G_a^(1/2) have the
lengths and angles of dW. All measurements here use these coordinates.

Shape letters: E evaluations, G generations, R samples of the batch, M targets, D = b, A = a, F = b a.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedule import Variant

ROLES = {0: "cond", 1: "uncond"}
BLOCK = re.compile(r"((?:down|up)_blocks\.\d+\.attentions\.\d+|mid_block\.attentions\.\d+|\w+_blocks\.\d+)\.")
SHORT = {"down_blocks": "down", "up_blocks": "up", "mid_block": "mid", "transformer_blocks": "block",
         "single_transformer_blocks": "single"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Track:
    """The weights of one conditioning over a run."""

    role: int
    """The host's index of the conditioning: 0 cond, 1 uncond."""
    weights_GRMF: Tensor
    """Generated weights in `coordinates`, without any strength."""
    generated_at: tuple[int, ...]
    """The evaluation of each generation, G."""
    generation_used: tuple[int, ...]
    """The generation whose weights each evaluation used, E; -1 without weights."""

    @property
    def name(self) -> str:
        """`cond`, `uncond` or the role's number."""
        return ROLES.get(self.role, f"role {self.role}")


@dataclass(frozen=True, slots=True)
class Rewards:
    """A reward's scores of the one-step predictions."""

    name: str
    scores_EB: Tensor


@dataclass(frozen=True, slots=True)
class Trace:
    """One sampling run."""

    variant: Variant
    key_times: tuple[float, ...]
    targets: tuple[str, ...]
    times: tuple[float, ...]
    """u of each evaluation, E."""
    strengths_EM: Tensor
    """The strength s of each target at each evaluation."""
    tracks: tuple[Track, ...]
    predictions_EBCHW: Tensor | None = None
    """Guided one-step predictions in the latents of the host's VAE, if they were recorded."""

    @property
    def shown(self) -> tuple[Track, ...]:
        """The tracks to plot: the conditional ones, or those of the only role."""
        first = min(track.role for track in self.tracks)
        return tuple(track for track in self.tracks if track.role == first)


class Dynamics(NamedTuple):
    """How the weights of a track change, each (E, R); NaN at evaluations without weights."""

    norms: Tensor
    """Length of s dW over all targets."""
    cosines: Tensor
    """Of the generated weights with the first ones (Fig 8, left axis)."""
    changes: Tensor
    """|dW - dW_first| / |dW_first| of the generated weights (Fig 8, right axis)."""


def gram_root(gram_MDD: Tensor) -> Tensor:
    """Returns the symmetric square root of Gram matrices (M, D, D)."""
    values_MD, vectors_MDD = torch.linalg.eigh(gram_MDD.double())
    return (vectors_MDD * values_MD.clamp_min(0).sqrt()[:, None]) @ vectors_MDD.transpose(-1, -2)


def coordinates(
    cores_GRMDA: Tensor, a_aux: Sequence[Tensor], b_aux: Sequence[Tensor], scale: float = 1.0
) -> Tensor:
    """Returns generated weights as (G, R, M, F) whose inner products are those of B_aux K A_aux.

    Args:
        cores_GRMDA: the cores K.
        a_aux: A_aux (a, d_in) of each target.
        b_aux: B_aux (d_out, b) of each target.
        scale: factor on all of them.
    """
    root_a_MAA = gram_root(torch.stack([a.double() @ a.double().T for a in a_aux]))
    root_b_MDD = gram_root(torch.stack([b.double().T @ b.double() for b in b_aux]))
    return (scale * root_b_MDD.float() @ cores_GRMDA.float() @ root_a_MAA.float()).flatten(-2)


def block_of(target: str) -> str:
    """Returns the short name of a target's block: `up 1.0` for `up_blocks.1.attentions.0...`."""
    match = BLOCK.match(target)
    if match is None:
        return target.partition(".")[0]
    stack, _, place = match[1].partition(".")
    return f"{SHORT.get(stack, stack)} {place.replace('attentions.', '')}"


def strengths(trace: Trace, track: Track) -> Tensor:
    """Returns the length |s| |dW| of each target's change (E, R, M); NaN at evaluations without weights."""
    norms_ERM = _at_evaluations(track, track.weights_GRMF.norm(dim=-1))
    return norms_ERM * trace.strengths_EM.abs()[:, None]


def block_strengths(trace: Trace) -> tuple[list[str], Tensor]:
    """Returns the blocks' names and the length of each block's change (E, blocks), a mean over samples."""
    every_ERM = torch.cat([strengths(trace, track) for track in trace.shown], dim=1)
    names = [block_of(target) for target in trace.targets]
    blocks = list(dict.fromkeys(names))
    member = torch.tensor([[name == block for block in blocks] for name in names], dtype=torch.float32)
    return blocks, (every_ERM.square() @ member).sqrt().nanmean(dim=1)


def dynamics(trace: Trace, track: Track) -> Dynamics:
    """Returns how a track's weights change, over all targets together."""
    weights_GRF = track.weights_GRMF.flatten(2)
    lengths_GR, first_RF = weights_GRF.norm(dim=-1), weights_GRF[0]
    first_R = lengths_GR[0]
    cosines_GR = (weights_GRF * first_RF).sum(-1) / (lengths_GR * first_R)
    changes_GR = (weights_GRF - first_RF).norm(dim=-1) / first_R
    norms_ER = strengths(trace, track).square().sum(-1).sqrt()
    return Dynamics(
        norms_ER, _at_evaluations(track, cosines_GR.clamp(-1, 1)), _at_evaluations(track, changes_GR)
    )


def shown_dynamics(trace: Trace) -> Dynamics:
    """Returns `dynamics` of all shown samples, each (E, samples)."""
    every = [dynamics(trace, track) for track in trace.shown]
    return Dynamics(*(torch.cat(parts, dim=1) for parts in zip(*every, strict=True)))


def generated_at(trace: Trace) -> list[int]:
    """Returns the evaluations at which shown weights were generated."""
    return sorted({evaluation for track in trace.shown for evaluation in track.generated_at})


def as_json(trace: Trace, rewards: Rewards | None = None) -> dict[str, Any]:
    """Returns all measurements as JSON types; null at evaluations without weights."""
    blocks, _ = block_strengths(trace)
    return {
        "variant": trace.variant,
        "key_times": [*trace.key_times],
        "u": rounded(torch.tensor(trace.times)),
        "blocks": blocks,
        "tracks": [_track_json(trace, track) for track in trace.tracks],
        "reward": None if rewards is None else {"name": rewards.name, "scores": rounded(rewards.scores_EB.T)},
    }


def _track_json(trace: Trace, track: Track) -> dict[str, Any]:
    """Returns one track; lists over samples contain one list over evaluations each."""
    alone = Trace(
        trace.variant, trace.key_times, trace.targets, trace.times, trace.strengths_EM, tracks=(track,)
    )
    changes = dynamics(trace, track)
    return {
        "name": track.name,
        "samples": track.weights_GRMF.shape[1],
        "generated_at": [evaluation + 1 for evaluation in track.generated_at],
        "block_strength": rounded(block_strengths(alone)[1].T),
        "norm": rounded(changes.norms.T),
        "cosine": rounded(changes.cosines.T),
        "relative_change": rounded(changes.changes.T),
    }


def _at_evaluations(track: Track, values_GR: Tensor) -> Tensor:
    """Returns the value (E, ...) of the generation that each evaluation used; NaN without one."""
    used = torch.tensor(track.generation_used)
    values_ER = values_GR[used.clamp_min(0)].clone()
    values_ER[used < 0] = math.nan
    return values_ER


def rounded(values: Tensor) -> Any:
    """Returns values as nested lists of numbers with six digits, None where they are not finite."""

    def plain(item: Any) -> Any:
        if isinstance(item, list):
            return [plain(part) for part in item]
        return float(f"{item:.6g}") if math.isfinite(item) else None

    return plain(values.tolist())
