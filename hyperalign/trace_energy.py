"""How the energy of generated weights divides over prompts and steps: a two-way analysis of variance.

Let w_ps be the change of one layer that is generated for sample p at generation s, and n_s the number of
steps which that generation serves, N of them in all. With m_p its mean over the steps, m_s its mean over the
samples and m that over both,

    w_ps = m + (m_p - m) + (m_s - m) + (w_ps - m_p - m_s + m).

The four terms are orthogonal under the weights n_s, so their energies add up to the whole one:

    sum_ps n_s |w_ps|^2  =  P N |m|^2                                    same for all
                         +  N sum_p |m_p - m|^2                          by prompt
                         +  P sum_s n_s |m_s - m|^2                      by time
                         +  sum_ps n_s |w_ps - m_p - m_s + m|^2          interaction

A static LoRA has all its energy in the first term, and variant I none in the last two. A sample is a prompt
with its noise: only samples that start from one noise make the second term the prompt's alone.

The energies of several layers add up too. They are those of dW = B_aux K A_aux, but no dW is made: `trace`
gives coordinates of the same lengths and angles.

Shape letters: P samples, S generations, F coordinates, M targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import HyperAlignError
from .trace import Trace

PARTS = ("same", "prompt", "time", "interaction")


def energies(weights_PSF: Tensor, counts_S: Tensor | None = None) -> Tensor:
    """Returns the energies (4,) of PARTS in float64; they sum to that of the weights.

    Args:
        weights_PSF: generated weights in coordinates that keep lengths and angles.
        counts_S: the steps that each generation serves; None for one each.
    """
    w_PSF = weights_PSF.double()
    samples, generations = w_PSF.shape[:2]
    n_S = w_PSF.new_ones(generations) if counts_S is None else counts_S.to(w_PSF)
    steps = n_S.sum()
    by_prompt_PF = torch.einsum("psf,s->pf", w_PSF, n_S) / steps
    by_time_SF = w_PSF.mean(dim=0)
    mean_F = by_prompt_PF.mean(dim=0)
    rest_PSF = w_PSF - by_prompt_PF[:, None] - by_time_SF + mean_F
    return torch.stack([
        samples * steps * mean_F.square().sum(),
        steps * (by_prompt_PF - mean_F).square().sum(),
        samples * (n_S * (by_time_SF - mean_F).square().sum(dim=1)).sum(),
        (n_S * rest_PSF.square().sum(dim=(0, 2))).sum(),
    ])  # fmt: skip


def trace_energies(traces: Sequence[Trace], samples: Sequence[int] | None = None) -> Tensor:
    """Returns the energies (M, 4) of every target over the shown samples of several runs.

    Args:
        traces: of one hypernetwork with the same steps, whose samples have one conditioning each.
        samples: which samples to take, counted over all traces; None for all.

    Raises:
        HyperAlignError: fewer than 2 samples.
    """
    tracks = [track for trace in traces for track in trace.shown]
    present = sum(track.weights_GRMF.shape[1] for track in tracks)
    chosen = [*range(present)] if samples is None else [*samples]
    if len(chosen) < 2:
        raise HyperAlignError(
            f"Found {len(chosen)} samples; the energy of weights divides over 2 or more. Sample more prompts."
        )
    used = torch.tensor([index for index in tracks[0].generation_used if index >= 0])
    counts_S = torch.bincount(used, minlength=len(tracks[0].generated_at))

    def weights_of(target: int) -> Tensor:
        parts = [track.weights_GRMF[:, :, target] for track in tracks]
        return torch.cat(parts, dim=1)[:, chosen].transpose(0, 1)

    return torch.stack([energies(weights_of(target), counts_S) for target in range(len(traces[0].targets))])


def image_shares(traces: Sequence[Trace]) -> dict[str, float]:
    """Returns the share of each of PARTS over the images of several runs, for plots.

    What differs between images of one prompt counts as "prompt", too: it is of the image, prompt and noise.
    Empty for one image, for weights of zero, and where regions of an image got theirs at different steps.
    """
    tracks = [track for trace in traces for track in trace.shown]
    images = sum(track.weights_GRMF.shape[1] for track in tracks)
    if images < 2 or len({track.generated_at for track in tracks}) > 1:
        return {}
    energies_M4 = trace_energies(traces)
    return dict(zip(PARTS, shares(energies_M4).tolist(), strict=True)) if energies_M4.any() else {}


def shares(energies_M4: Tensor) -> Tensor:
    """Returns the share (4,) of each of PARTS in the energy of all targets; NaN where all is zero."""
    parts_4 = energies_M4.sum(dim=0)
    return parts_4 / parts_4.sum()
