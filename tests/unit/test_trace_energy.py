"""How the energy of generated weights divides: what is known of it without computing it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyperalign.delta import merged_delta
from hyperalign.errors import HyperAlignError
from hyperalign.trace import Trace, Track, coordinates
from hyperalign.trace_energy import PARTS, energies, image_shares, shares, trace_energies

seeds = st.integers(0, 2**31)
SAMPLES, STEPS, WIDTH = 5, 4, 6


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centred(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Values whose mean over the first dimension is 0."""
    weights = torch.ones(len(values), dtype=values.dtype) if weights is None else weights
    return values - torch.einsum("n...,n->...", values, weights) / weights.sum()


CONSTANT = random(0, WIDTH).expand(SAMPLES, STEPS, WIDTH)
OF_PROMPT = centred(random(1, SAMPLES, WIDTH))[:, None].expand(SAMPLES, STEPS, WIDTH)
OF_TIME = centred(random(2, STEPS, WIDTH)).expand(SAMPLES, STEPS, WIDTH)
OF_BOTH = centred(random(3, SAMPLES, 1))[:, None] * centred(random(4, STEPS, WIDTH))


@pytest.mark.parametrize(
    ("part", "weights"),
    zip(PARTS, (CONSTANT, OF_PROMPT, OF_TIME, OF_BOTH), strict=True),
    ids=PARTS,
)
def test_weights_of_one_kind_have_all_their_energy_in_its_part(part: str, weights: Tensor) -> None:
    found = dict(zip(PARTS, energies(weights).tolist(), strict=True))
    whole = float(weights.square().sum())
    assert found == {name: pytest.approx(whole if name == part else 0.0, abs=1e-9 * whole) for name in PARTS}


def test_weights_of_all_kinds_have_the_energy_of_each() -> None:
    kinds = (CONSTANT, OF_PROMPT, OF_TIME, OF_BOTH)
    expected = [float(kind.square().sum()) for kind in kinds]
    assert energies(sum(kinds, torch.zeros(()))).tolist() == pytest.approx(expected)


@settings(max_examples=30)
@given(seed=seeds, samples=st.integers(2, 6), steps=st.integers(1, 5), data=st.data())
def test_the_parts_sum_to_the_energy_of_the_weights(
    seed: int, samples: int, steps: int, data: st.DataObject
) -> None:
    weights = random(seed, samples, steps, 3)
    counts = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=steps, max_size=steps)))
    whole = float((weights.square().sum(dim=(0, 2)) * counts).sum())
    found = energies(weights, counts)
    assert float(found.sum()) == pytest.approx(whole, rel=1e-9)
    assert bool((found >= 0).all())
    repeated = energies(weights.repeat_interleave(counts, dim=1))
    assert found.tolist() == pytest.approx(repeated.tolist(), rel=1e-9, abs=1e-12 * whole)


def trace_of(weights_GRMF: Tensor, used: tuple[int, ...]) -> Trace:
    """A trace whose evaluations used these generations, -1 where it was off."""
    targets = tuple(f"up_blocks.{m}.attentions.0.to_q" for m in range(weights_GRMF.shape[2]))
    written = tuple(used.index(generation) for generation in range(len(weights_GRMF)))
    times = tuple(1 - place / len(used) for place in range(len(used)))
    track = Track(0, weights_GRMF, written, used)
    return Trace("P", (0.5,), targets, times, torch.ones(len(used), len(targets)), (track,))


def test_a_traces_generations_count_as_often_as_they_serve_and_targets_stay_apart() -> None:
    weights = random(5, 3, SAMPLES, 2, WIDTH)
    found = trace_energies([trace_of(weights, (-1, 0, 1, 1, 1, 2))])
    counts = torch.tensor([1, 3, 1])
    expected = torch.stack([energies(weights[:, :, m].transpose(0, 1), counts) for m in range(2)])
    assert found.shape == (2, 4)
    assert torch.allclose(found, expected)
    assert torch.allclose(shares(found), expected.sum(0) / expected.sum())


def test_samples_of_several_traces_are_one_list_to_choose_from() -> None:
    weights, used = random(6, 2, SAMPLES, 3, WIDTH), (0, 0, 1)
    parts = [trace_of(weights[:, :2], used), trace_of(weights[:, 2:], used)]
    assert torch.allclose(trace_energies(parts), trace_energies([trace_of(weights, used)]))
    some = trace_energies(parts, [0, 3, 4])
    assert torch.allclose(some, trace_energies([trace_of(weights[:, [0, 3, 4]], used)]))


def test_the_energies_are_those_of_the_merged_weights() -> None:
    a_aux, b_aux, cores = random(7, 1, 3, 8), random(8, 1, 7, 3), random(9, STEPS, SAMPLES, 1, 3, 3)
    small = coordinates(cores, list(a_aux), list(b_aux))
    merged = merged_delta(a_aux[0], b_aux[0], cores[:, :, 0]).flatten(-2)
    found = trace_energies([trace_of(small, tuple(range(STEPS)))])[0]
    expected = energies(merged.transpose(0, 1))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_weights_of_the_empty_prompt_are_not_counted() -> None:
    trace = trace_of(random(10, 2, 3, 1, WIDTH), (0, 1))
    uncond = Track(1, random(11, 2, 3, 1, WIDTH), (0, 1), (0, 1))
    both = dataclasses.replace(trace, tracks=(*trace.tracks, uncond))
    assert torch.equal(trace_energies([both]), trace_energies([trace]))


@pytest.mark.parametrize(("samples", "chosen"), [(1, None), (3, [2])])
def test_one_sample_cannot_be_divided(samples: int, chosen: list[int] | None) -> None:
    with pytest.raises(HyperAlignError, match="Found 1 samples; .* Sample more prompts"):
        trace_energies([trace_of(random(12, 2, samples, 1, WIDTH), (0, 1))], chosen)


def test_shares_of_no_energy_are_undefined() -> None:
    assert bool(shares(torch.zeros(2, 4)).isnan().all())


def test_the_shares_of_images_are_those_of_their_energies() -> None:
    traces = [
        trace_of(random(21, 3, 2, 2, WIDTH), (0, 1, 2)),
        trace_of(random(22, 3, 1, 2, WIDTH), (0, 1, 2)),
    ]
    expected = shares(trace_energies(traces)).tolist()
    assert list(image_shares(traces).values()) == pytest.approx(expected)
    assert list(image_shares(traces)) == list(PARTS)


def test_one_image_no_weights_and_regions_of_other_steps_have_no_shares() -> None:
    assert image_shares([trace_of(random(23, 3, 1, 2, WIDTH), (0, 1, 2))]) == {}
    early, late = (
        trace_of(random(seed, 2, 1, 2, WIDTH), used) for seed, used in ((24, (0, 1, 1)), (25, (0, 0, 1)))
    )
    assert image_shares([trace_of(torch.zeros(2, 3, 1, WIDTH), (0, 1))]) == {}
    regions = dataclasses.replace(early, tracks=(*early.tracks, *late.tracks))
    assert image_shares([regions]) == {}
