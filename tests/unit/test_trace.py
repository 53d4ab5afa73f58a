"""Strength, angle and change of generated weights, and their principal components."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyperalign.delta import merged_delta
from hyperalign.errors import HyperAlignError
from hyperalign.trace import (
    Rewards,
    Trace,
    Track,
    as_json,
    block_of,
    block_strengths,
    coordinates,
    dynamics,
    generated_at,
    gram_root,
    shown_dynamics,
    strengths,
)
from hyperalign.trace_pca import pca, relative_spread, spread_of

seeds = st.integers(0, 2**31)
TARGETS = tuple(
    f"{block}.transformer_blocks.0.attn1.{layer}"
    for block in ("mid_block.attentions.0", "up_blocks.1.attentions.2")
    for layer in ("to_q", "to_k")
)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(weights: Tensor, written=None, in_force=None, role: int = 0, strength: float = 1.0) -> Trace:
    """A trace of one track, by default of variant S."""
    generations = len(weights)
    written = tuple(range(generations)) if written is None else written
    in_force = tuple(range(generations)) if in_force is None else in_force
    times = tuple(1 - place / len(in_force) for place in range(len(in_force)))
    scales = torch.full((len(times), len(TARGETS)), strength)
    return Trace("S", (), TARGETS, times, scales, (Track(role, weights, written, in_force),))


@settings(max_examples=25)
@given(seed=seeds, sizes=st.tuples(*[st.integers(1, 5)] * 4))
def test_coordinates_have_the_lengths_and_angles_of_the_merged_weights(seed, sizes):
    d_in, d_out, a, b = sizes
    cores, targets = random(seed, 2, 3, 2, b, a), range(2)
    a_aux, b_aux = random(seed + 1, 2, a, d_in), random(seed + 2, 2, d_out, b)
    found = coordinates(cores, list(a_aux), list(b_aux))
    deltas = torch.stack([merged_delta(a_aux[m], b_aux[m], cores[:, :, m]) for m in targets], dim=2)
    expected = deltas.flatten(-2).flatten(0, 1)
    points = found.flatten(0, 1)
    for m in targets:
        products = points[:, m] @ points[:, m].T
        wanted = expected[:, m] @ expected[:, m].T
        assert torch.allclose(products, wanted, atol=1e-3 * float(wanted.abs().max()) + 1e-6)


@given(seed=seeds, factor=st.floats(-3, 3))
def test_the_first_weights_are_like_themselves_and_strength_leaves_angles(seed, factor):
    weights = random(seed, 4, 2, len(TARGETS), 6)
    plain, scaled = make(weights), make(weights, strength=factor)
    moves, other = (dynamics(trace, trace.tracks[0]) for trace in (plain, scaled))
    assert torch.allclose(moves.cosines[0], torch.ones(2))
    assert torch.equal(moves.changes[0], torch.zeros(2))
    assert bool((moves.cosines.abs() <= 1).all())
    assert torch.equal(moves.cosines, other.cosines)
    assert torch.equal(moves.changes, other.changes)
    assert torch.allclose(other.norms, abs(factor) * moves.norms, atol=1e-5)


@given(seed=seeds, factor=st.floats(0.1, 5))
def test_grown_weights_change_in_length_alone(seed, factor):
    first = random(seed, 1, 1, len(TARGETS), 6)
    trace = make(torch.cat([first, factor * first, -first]))
    moves = dynamics(trace, trace.tracks[0])
    assert moves.cosines[:, 0].tolist() == pytest.approx([1, 1, -1], abs=1e-5)
    assert moves.changes[:, 0].tolist() == pytest.approx([0, abs(factor - 1), 2], abs=1e-4)


def test_blocks_join_the_lengths_of_their_layers():
    weights = torch.zeros(1, 1, len(TARGETS), 1)
    weights[0, 0, :, 0] = torch.tensor([3.0, 4.0, 5.0, 12.0])
    blocks, lengths = block_strengths(make(weights, strength=-2.0))
    assert blocks == ["mid 0", "up 1.2"]
    assert lengths.tolist() == [[10.0, 26.0]]


@pytest.mark.parametrize(
    ("target", "block"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.3.attn1.to_q", "down 1.0"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", "mid 0"),
        ("transformer_blocks.18.attn.to_q", "block 18"),
        ("single_transformer_blocks.37.attn.to_k", "single 37"),
        ("something.else", "something"),
    ],
)
def test_blocks_have_short_names(target, block):
    assert block_of(target) == block


def test_weights_serve_until_others_are_written():
    trace = make(random(0, 2, 1, len(TARGETS), 6), written=(1, 3), in_force=(-1, 0, 0, 1, -1))
    moves = dynamics(trace, trace.tracks[0])
    assert moves.cosines[:, 0].isnan().tolist() == [True, False, False, False, True]
    assert moves.changes[1:3, 0].tolist() == [0, 0]
    assert float(moves.changes[3, 0]) > 0


def test_the_conditional_rows_are_shown_and_all_are_told():
    weights = random(0, 3, 2, len(TARGETS), 6)
    cond, uncond = make(weights).tracks[0], make(2 * weights, role=1).tracks[0]
    trace = Trace("S", (), TARGETS, (1.0, 0.5, 0.0), torch.ones(3, len(TARGETS)), (uncond, cond))
    assert trace.shown == (cond,)
    assert torch.equal(shown_dynamics(trace).norms, dynamics(trace, cond).norms)
    numbers = as_json(trace, Rewards("judge", torch.tensor([[1.0, 2.0]] * 3)))
    assert [track["name"] for track in numbers["tracks"]] == ["uncond", "cond"]
    assert numbers["reward"] == {"name": "judge", "scores": [[1.0] * 3, [2.0] * 3]}


def test_what_is_no_number_is_null_in_json():
    trace = make(random(0, 1, 1, len(TARGETS), 6), in_force=(-1, 0))
    text = json.dumps(as_json(trace), allow_nan=False)
    assert json.loads(text)["tracks"][0]["norm"][0][0] is None
    silent = make(torch.zeros(1, 1, len(TARGETS), 6))  # B_aux is still zero
    assert as_json(silent)["tracks"][0]["cosine"] == [[None]]


@settings(max_examples=25)
@given(seed=seeds, count=st.integers(3, 12), width=st.integers(2, 20))
def test_principal_components_are_those_of_the_singular_values(seed, count, width):
    points = random(seed, count, width)
    places, explained = pca(points)
    values = torch.linalg.svdvals(points - points.mean(dim=0))
    assert places.norm(dim=0).tolist() == pytest.approx(values[:2].tolist(), rel=1e-3, abs=1e-3)
    shares = values.square() / values.square().sum()
    assert explained.tolist() == pytest.approx(shares[:2].tolist(), abs=1e-3)
    assert float(places[:, 0] @ places[:, 1]) == pytest.approx(0, abs=1e-2)


def test_points_in_a_plane_keep_their_distances():
    plane = random(3, 7, 2)
    places, explained = pca(plane @ torch.linalg.qr(random(4, 9, 2))[0].T)
    assert torch.allclose(torch.cdist(places, places), torch.cdist(plane, plane), atol=1e-4)
    assert float(explained.sum()) == pytest.approx(1)


def test_points_that_are_all_the_same_lie_in_one_place():
    places, explained = pca(torch.ones(4, 5))
    assert torch.equal(places, torch.zeros(4, 2))
    assert explained.tolist() == [0, 0]
    assert relative_spread(torch.ones(4, 5)) == 0


def test_too_few_images_have_no_plane():
    with pytest.raises(HyperAlignError, match="Found 2 points"):
        spread_of([make(random(0, 1, 2, len(TARGETS), 6))])


def test_steps_are_picked_evenly_with_both_ends():
    spread = spread_of([make(random(0, 25, 4, len(TARGETS), 6))])
    assert spread.evaluations == (0, 5, 10, 14, 19, 24)
    assert spread.places_SN2.shape == (6, 4, 2)
    assert not any(math.isnan(value) for value in spread.spreads)
    assert json.loads(json.dumps(spread.as_json()))["trace_of_point"] == [0, 0, 0, 0]


def test_a_root_of_a_gram_matrix_squares_to_it_and_small_noise_below_zero_is_none() -> None:
    roots = gram_root(torch.tensor([[[5.0, 4.0], [4.0, 5.0]], [[4.0, 0.0], [0.0, -1e-9]]]))
    assert roots.dtype == torch.float64
    assert roots[0].flatten().tolist() == pytest.approx([2, 1, 1, 2])
    assert roots[1].flatten().tolist() == pytest.approx([2, 0, 0, 0])


def test_coordinates_may_be_scaled():
    cores, a_aux, b_aux = random(0, 1, 1, 1, 2, 2), random(1, 1, 2, 3), random(2, 1, 4, 2)
    plain, scaled = (coordinates(cores, list(a_aux), list(b_aux), *more) for more in ((), (-3.0,)))
    assert torch.allclose(scaled, -3 * plain)
    assert coordinates(cores.half(), list(a_aux.half()), list(b_aux.half())).dtype == torch.float32


def by_hand() -> Trace:
    """Two rows, two targets of one number; three evaluations, the second of which nothing served."""
    weights = torch.tensor([[[[3.0], [4.0]], [[1.0], [0.0]]], [[[-4.0], [3.0]], [[2.0], [2.0]]]])
    scales = torch.tensor([[1.0, 1.0], [5.0, 5.0], [-2.0, 0.5]])
    track = Track(0, weights, (0, 2), (0, -1, 1))
    targets = tuple(f"up_blocks.0.attentions.1.{layer}" for layer in "xy")
    return Trace("P", (0.5,), targets, (1.0, 0.6, 1 / 3), scales, (track,))


def test_strengths_by_hand():
    found = strengths(by_hand(), by_hand().tracks[0])
    assert found[0].tolist() == [[3, 4], [1, 0]]
    assert found[1].isnan().all()
    assert found[2].tolist() == [[8, 1.5], [4, 1]]


def test_moves_by_hand():
    moves = dynamics(by_hand(), by_hand().tracks[0])
    assert moves.norms[[0, 2]].flatten().tolist() == pytest.approx([5, 1, 66.25**0.5, 17**0.5])
    assert moves.cosines[[0, 2]].flatten().tolist() == pytest.approx([1, 1, 0, 0.5**0.5])
    assert moves.changes[[0, 2]].flatten().tolist() == pytest.approx([0, 0, 2**0.5, 5**0.5])


def test_a_block_s_strength_is_the_mean_over_its_rows():
    blocks, lengths = block_strengths(by_hand())
    assert blocks == ["up 0.1"]
    assert lengths[[0, 2], 0].tolist() == pytest.approx([3, (66.25**0.5 + 17**0.5) / 2])


def test_a_cosine_is_relative_to_both_lengths():
    """From (2, 0) to a vector of length 3 at 60 degrees, and to its opposite: the product is 3 of 2 x 3."""
    weights = torch.zeros(3, 1, len(TARGETS), 2)
    weights[:, 0, 0] = torch.tensor([[2.0, 0.0], [1.5, 1.5 * 3**0.5], [-1.5, -1.5 * 3**0.5]])
    trace = make(weights)
    assert dynamics(trace, trace.tracks[0]).cosines[:, 0].tolist() == pytest.approx([1.0, 0.5, -0.5])
    assert as_json(trace)["tracks"][0]["samples"] == 1


def test_rows_of_several_shown_tracks_stand_side_by_side():
    trace = by_hand()
    (track,) = trace.tracks
    lone = Track(0, track.weights_GRMF[:1, :1] * 2, (1,), (-1, 0, 0))
    other = Track(2, track.weights_GRMF, (1,), (0, 0, 0))
    both = Trace("P", (), trace.targets, trace.times, trace.strengths_EM, (track, other, lone))
    assert both.shown == (track, lone)
    assert generated_at(both) == [0, 1, 2]
    assert shown_dynamics(both).norms.shape == (3, 3)
    assert shown_dynamics(both).norms[1].tolist()[2] == pytest.approx(50)
    assert block_strengths(both)[1].flatten().tolist() == pytest.approx(
        [3, 50, (66.25**0.5 + 17**0.5 + (36 * 4 + 64 / 4) ** 0.5) / 3]
    )
    assert [one.name for one in both.tracks] == ["cond", "role 2", "cond"]
    assert Track(1, track.weights_GRMF, (), ()).name == "uncond"


def test_all_is_told_in_json_by_rows():
    numbers = as_json(by_hand(), Rewards("judge", torch.tensor([[1 / 3], [2.0], [math.inf]])))
    assert (numbers["variant"], numbers["key_times"], numbers["blocks"]) == ("P", [0.5], ["up 0.1"])
    assert numbers["u"] == [1.0, 0.6, 0.333333]
    assert numbers["reward"] == {"name": "judge", "scores": [[0.333333, 2.0, None]]}
    (track,) = numbers["tracks"]
    assert (track["name"], track["samples"], track["generated_at"]) == ("cond", 2, [1, 3])
    assert track["norm"] == [[5.0, None, 8.13941], [1.0, None, 4.12311]]
    assert track["cosine"] == [[1.0, None, 0.0], [1.0, None, 0.707107]]
    assert track["relative_change"] == [[0.0, None, 1.41421], [0.0, None, 2.23607]]
    assert track["block_strength"] == [[3.0, None, 6.13126]]
    assert as_json(by_hand())["reward"] is None


def test_weights_do_not_change_when_looked_at():
    trace = make(random(0, 1, 1, len(TARGETS), 6), in_force=(-1, 0))
    kept = trace.tracks[0].weights_GRMF.clone()
    dynamics(trace, trace.tracks[0])
    strengths(trace, trace.tracks[0])
    assert torch.equal(trace.tracks[0].weights_GRMF, kept)
