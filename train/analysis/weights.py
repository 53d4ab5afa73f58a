"""Figures of the weights that a hypernetwork generates while it samples a prompt list.

- `Dynamics` is Figure 8: the cosine similarity of the weights at each step with those of the first step, and
  their relative change |dW_s - dW_1| / |dW_1|; mean and quantiles over the prompts.
- `Variation` is Figure 9: the weights of all prompts on their first two principal components, at a few steps.
  One plane serves all steps, so that the spreads can be compared. The paper draws 200 prompts at random.
- `Division` is no figure of the paper: the energy of the weights that is the same for all, by prompt, by time
  and their interaction (`hyperalign.trace_energy`).

All of them are of the conditional weights; with classifier-free guidance the empty prompt has others.

Shape letters: E evaluations, P prompts, G generations, M targets, F coordinates, K blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperalign.checkpoint import HyperAlign
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.tracing import Recorder
from hyperalign.trace import Trace, block_of, generated_at, rounded, shown_dynamics
from hyperalign.trace_energy import PARTS, shares, trace_energies
from hyperalign.trace_pca import Spread, relative_spread, spread_of
from train.analysis.statistics import Band, band, standard_error
from train.models.base import Base, PromptEncoder, cfg_conditions
from train.rollout import rollout
from train.sampling import initial_noise

LEAST_PROMPTS = 3
"""Fewer have no principal plane."""


def trace_prompts(
    base: Base,
    encoder: PromptEncoder,
    hyperalign: HyperAlign,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    batch: int,
    seed: int = 0,
    same_noise: bool = False,
) -> Iterator[Trace]:
    """Samples every prompt once and yields the traces of its conditional weights, a batch at a time.

    Args:
        base: the base model.
        encoder: has the conditions of the prompts.
        hyperalign: the hypernetwork, on the device of the base model; it generates as its header schedules.
        prompts: the list; a prompt's place in it and `seed` decide its noise.
        steps: sampling steps.
        guidance_scale: of classifier-free guidance.
        batch: prompts to sample at once.
        seed: of the noise.
        same_noise: whether all prompts start from the first one's noise.
    """
    adapter, schedule = Adapter(base.backbone, hyperalign), hyperalign.header.schedule
    for first in range(0, len(prompts), batch):
        chunk = prompts[first : first + batch]
        places = [0 if same_noise else first + index for index in range(len(chunk))]
        noise = torch.stack([initial_noise(place, seed, base.latent_shape) for place in places])
        cond, uncond = cfg_conditions(base, encoder, chunk, guidance_scale)
        recorder = Recorder()
        run = recorder.open(schedule)
        rollout(
            base, adapter, schedule, cond, uncond, noise.to(base.device),
            steps=steps, guidance_scale=guidance_scale, run=run,
        )  # fmt: skip
        recorder.keep(run, adapter.network, 1.0, None)
        yield _conditional(recorder.select().trace(), len(chunk))


def _conditional(trace: Trace, samples: int) -> Trace:
    """Returns the trace of the first samples; a rollout has those of the empty prompt behind them."""
    tracks = tuple(
        dataclasses.replace(track, weights_GRMF=track.weights_GRMF[:, :samples].clone())
        for track in trace.tracks
    )
    return dataclasses.replace(trace, tracks=tracks)


def check_not_zero(hyperalign: HyperAlign) -> None:
    """Raises HyperAlignError for a hypernetwork that changes nothing, whose weights have no direction."""
    if not any(bool(matrix.any()) for matrix in hyperalign.network.b_aux):
        raise HyperAlignError(
            "The hypernetwork generates weights of zero: all of its B_aux are zero, as before training. Name "
            "one that was trained."
        )


@dataclass(frozen=True, slots=True)
class Dynamics:
    """Figure 8: how the weights move away from those of the first step."""

    times: tuple[float, ...]
    """u of each evaluation, E."""
    generated_at: tuple[int, ...]
    """The evaluations at which weights were generated."""
    cosine: Band
    relative_change: Band
    length: Band
    """Length of dW over all layers together."""

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON types, steps counted from 1."""
        return {
            "u": rounded(torch.tensor(self.times)),
            "generated_at": [evaluation + 1 for evaluation in self.generated_at],
            "cosine": self.cosine.as_json(),
            "relative_change": self.relative_change.as_json(),
            "length": self.length.as_json(),
        }


def dynamics_of(traces: Sequence[Trace]) -> Dynamics:
    """Returns Figure 8 of two or more prompts."""
    every = [shown_dynamics(trace) for trace in traces]
    lengths, cosines, changes = (torch.cat(parts, dim=1) for parts in zip(*every, strict=True))
    return Dynamics(
        traces[0].times, tuple(generated_at(traces[0])), band(cosines), band(changes), band(lengths)
    )


@dataclass(frozen=True, slots=True)
class Variation:
    """Figure 9: how the weights differ over the prompts."""

    shown: Spread
    """The points at a few steps."""
    generated_at: tuple[int, ...]
    spread_G: Tensor
    """Root mean square distance of each generation's weights from their mean, relative to their length."""
    error_G: Tensor
    """Its standard error."""

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON types, steps counted from 1; the points are in the order of the prompts."""
        return {
            "spread": {
                "generated_at": [evaluation + 1 for evaluation in self.generated_at],
                "relative": rounded(self.spread_G),
                "standard_error": rounded(self.error_G),
            },
            "plane": {
                "steps": [evaluation + 1 for evaluation in self.shown.evaluations],
                "u": rounded(torch.tensor(self.shown.times)),
                "explained": rounded(torch.tensor(self.shown.explained)),
                "points": rounded(self.shown.places_SN2),
            },
        }


def variation_of(traces: Sequence[Trace], panels: int) -> Variation:
    """Returns Figure 9 at `panels` steps. Raises HyperAlignError for fewer than 3 prompts."""
    shown, times = spread_of(traces, panels), generated_at(traces[0])
    spreads, errors = list[float](), list[Tensor]()
    for generation in range(len(times)):
        points = [track.weights_GRMF[generation].flatten(1) for trace in traces for track in trace.shown]
        points_PF = torch.cat(points)

        def spread(chosen: Sequence[int], points_PF: Tensor = points_PF) -> Tensor:
            return torch.tensor(relative_spread(points_PF[list(chosen)]))

        spreads.append(relative_spread(points_PF))
        errors.append(standard_error(spread, len(points_PF)))
    return Variation(shown, tuple(times), torch.tensor(spreads), torch.stack(errors))


@dataclass(frozen=True, slots=True)
class Division:
    """The energy of the weights: the same for all, by prompt, by time, interaction."""

    shares_4: Tensor
    """Of all layers together, in the order of PARTS."""
    error_4: Tensor
    """Their standard errors over the prompts."""
    blocks: tuple[str, ...]
    """Names of the blocks, K."""
    energies_K4: Tensor
    """Energy of each block, the mean of a prompt and step."""

    @property
    def block_shares_K4(self) -> Tensor:
        """The shares within each block."""
        return self.energies_K4 / self.energies_K4.sum(dim=1, keepdim=True)

    @property
    def block_energy_K(self) -> Tensor:
        """Each block's share of the whole energy."""
        return self.energies_K4.sum(dim=1) / self.energies_K4.sum()

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON types."""
        rows = zip(self.blocks, rounded(self.block_energy_K), rounded(self.block_shares_K4), strict=True)
        return {
            "shares": dict(zip(PARTS, rounded(self.shares_4), strict=True)),
            "standard_error": dict(zip(PARTS, rounded(self.error_4), strict=True)),
            "mean_square_length": rounded(self.energies_K4.sum()),
            "blocks": [
                {"block": block, "share_of_energy": energy, **dict(zip(PARTS, parts, strict=True))}
                for block, energy, parts in rows
            ],
        }


def division_of(traces: Sequence[Trace]) -> Division:
    """Returns the division of energy over 3 or more prompts and all steps."""
    prompts = sum(track.weights_GRMF.shape[1] for trace in traces for track in trace.shown)
    energies_M4 = trace_energies(traces)
    names = [block_of(target) for target in traces[0].targets]
    blocks = list(dict.fromkeys(names))
    places = torch.tensor([blocks.index(name) for name in names])
    energies_K4 = energies_M4.new_zeros(len(blocks), len(PARTS)).index_add(0, places, energies_M4)
    error_4 = standard_error(lambda chosen: shares(trace_energies(traces, chosen)), prompts)
    count = prompts * len(traces[0].times)
    return Division(shares(energies_M4), error_4, tuple(blocks), energies_K4 / count)
