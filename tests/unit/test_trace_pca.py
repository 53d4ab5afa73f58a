"""Principal components by hand, the steps that are shown, and traces that do not belong together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from hyperalign.errors import HyperAlignError
from hyperalign.trace import Trace, Track
from hyperalign.trace_pca import STEPS, pca, relative_spread, spread_of

TARGETS = ("one", "two")


def traced(weights: Tensor, written: tuple[int, ...], in_force: tuple[int, ...], role: int = 0) -> Trace:
    times = tuple(1 - place / 10 for place in range(len(in_force)))
    scales = torch.ones(len(in_force), len(TARGETS))
    return Trace("S", (), TARGETS, times, scales, (Track(role, weights, written, in_force),))


def test_components_are_those_of_the_singular_vectors_with_the_greatest_coordinate_positive() -> None:
    points = torch.tensor([[-3.0, 0.1, 7.0], [-1.0, -0.2, 7.0], [4.0, 0.1, 7.0]]) + 5
    for sign in (1.0, -1.0):
        places, explained = pca(sign * points)
        parts = torch.linalg.svd(points - points.mean(0))
        expected = parts.U[:, :2] * parts.S[:2]
        torch.testing.assert_close(places.abs(), expected.abs(), atol=1e-5, rtol=1e-5)
        greatest = places[places.abs().argmax(dim=0), torch.arange(2)]
        assert bool((greatest > 0).all())
        assert explained.tolist() == pytest.approx((parts.S[:2] ** 2 / (parts.S**2).sum()).tolist(), abs=1e-6)
        assert places.dtype == explained.dtype == torch.float32
    assert pca(points, components=1)[0].shape == (3, 1)
    assert pca(points.half())[0].dtype == torch.float32


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_the_greatest_coordinate_is_positive_whatever_the_sign_of_the_singular_vector(size: float) -> None:
    for seed in range(20):
        points = size * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        places, explained = pca(points)
        parts = torch.linalg.svd(points - points.mean(0), full_matrices=False)
        expected = parts.U[:, :2] * parts.S[:2]
        expected *= torch.sign(expected[expected.abs().argmax(dim=0), torch.arange(2)])
        torch.testing.assert_close(places, expected, atol=1e-4 * size, rtol=1e-3)
        assert explained.tolist() == pytest.approx((parts.S[:2] ** 2 / (parts.S**2).sum()).tolist(), abs=1e-5)


def test_points_on_a_line_have_one_component_and_equal_points_none() -> None:
    for seed in range(10):
        start, along, by = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
        places, explained = pca(start + by[:, None] * along)
        assert explained.tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
        lengths = (by - by.mean()) * along.norm()
        torch.testing.assert_close(places[:, 0].abs(), lengths.abs(), atol=1e-4, rtol=1e-4)
        assert places[:, 1].abs().max() < 1e-2
    places, explained = pca(torch.ones(3, 2))
    assert places.tolist() == [[0.0, 0.0]] * 3 and explained.tolist() == [0.0, 0.0]


def test_half_precision_is_centred_in_single_precision() -> None:
    """The mean 1000 2/3 is no number in half precision."""
    points = torch.tensor([[1000.0, 0.0], [1001.0, 0.0], [1001.0, 1.0]])
    torch.testing.assert_close(pca(points.half()), pca(points))


def test_the_spread_by_hand() -> None:
    """Mean (1, 1): squared distances 2 + 2 of squared lengths 8 + 0. Mean 1: 4 + 0 + 4 of 9 + 1 + 1."""
    points = torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    assert relative_spread(points) == pytest.approx((4 / 8) ** 0.5)
    assert relative_spread(torch.tensor([[3.0], [1.0], [-1.0]])) == pytest.approx((8 / 11) ** 0.5)
    assert relative_spread(points / 100) == pytest.approx((4 / 8) ** 0.5)
    assert relative_spread(torch.zeros(3, 2)) == 0.0


def test_two_points_are_too_few_and_three_are_enough() -> None:
    assert pca(torch.eye(3))[0].shape == (3, 2)
    with pytest.raises(HyperAlignError, match="Found 2 points"):
        pca(torch.eye(2))


def test_rows_of_all_traces_lie_in_one_plane_in_order() -> None:
    torch.manual_seed(0)
    one, other = (traced(torch.randn(2, rows, 2, 3), (0, 2), (0, 0, 1)) for rows in (2, 1))
    spread = spread_of([one, dataclasses.replace(other, times=(0.9, 0.8, 0.7))])
    weights = torch.cat([trace.tracks[0].weights_GRMF.flatten(2) for trace in (one, other)], dim=1)
    assert (spread.evaluations, spread.times, spread.traces) == ((0, 2), (1.0, 0.8), (0, 0, 1))
    places, explained = pca(weights.flatten(0, 1))
    torch.testing.assert_close(spread.places_SN2, places.view(2, 3, 2))
    assert spread.explained == pytest.approx(tuple(explained.tolist()))
    assert spread.spreads == pytest.approx([relative_spread(step) for step in weights])


def test_the_conditional_rows_of_all_regions_are_shown() -> None:
    torch.manual_seed(0)
    trace = traced(torch.randn(1, 2, 2, 3), (0,), (0,))
    more = traced(torch.randn(1, 1, 2, 3), (0,), (0,)).tracks[0]
    uncond = traced(torch.randn(1, 5, 2, 3), (0,), (0,), role=1).tracks[0]
    both = dataclasses.replace(trace, tracks=(*trace.tracks, more, uncond))
    assert spread_of([both]).traces == (0, 0, 0)


@pytest.mark.parametrize(
    ("written", "steps", "shown"),
    [(4, 6, (0, 1, 2, 3)), (6, 6, (0, 1, 2, 3, 4, 5)), (7, 6, (0, 1, 2, 4, 5, 6)), (11, 3, (0, 5, 10)),
     (9, 2, (0, 8)), (1, 1, (0,)), (9, STEPS, (0, 2, 3, 5, 6, 8))],
)  # fmt: skip
def test_at_most_six_steps_are_shown_evenly_with_both_ends(written: int, steps: int, shown) -> None:
    assert STEPS == 6
    every = tuple(range(written))
    trace = traced(torch.rand(written, 3, 2, 3), every, every)
    assert spread_of([trace], steps).evaluations == shown
    if steps == STEPS:
        assert spread_of([trace]).evaluations == shown


def test_it_is_told_in_json_with_steps_from_1_and_six_digits() -> None:
    trace = traced(torch.rand(2, 3, 2, 3), (0, 1), (0, 1))
    spread = dataclasses.replace(
        spread_of([trace]), times=(1 / 3, 0.25), explained=(2 / 3, 0.1), spreads=(1 / 7, 0.5),
        shares={"same": 2 / 3},
        places_SN2=torch.tensor([[[1 / 3, 1234567.0]], [[0.0, -1e-9]]]), traces=(0, 4),
    )  # fmt: skip
    assert spread.as_json() == {
        "evaluations": [1, 2], "u": [0.333333, 0.25], "explained": [0.666667, 0.1],
        "spread": [0.142857, 0.5], "trace_of_point": [0, 4],
        "shares": {"same": 0.666667},
        "points": [[[0.333333, 1234570.0]], [[0.0, -1e-09]]],
    }  # fmt: skip


def test_regions_that_did_not_act_at_the_same_steps_are_refused() -> None:
    trace = traced(torch.rand(2, 3, 2, 3), (0, 1), (0, 1))
    late = traced(torch.rand(1, 3, 2, 3), (1,), (-1, 0)).tracks[0]
    with pytest.raises(HyperAlignError, match="regions"):
        spread_of([dataclasses.replace(trace, tracks=(*trace.tracks, late))])


def test_traces_that_do_not_belong_together_are_refused_by_their_place() -> None:
    first = traced(torch.rand(2, 3, 2, 3), (0, 1), (0, 1))
    others = {
        "another hypernetwork": [
            dataclasses.replace(first, targets=("one", "three")),
            traced(torch.rand(2, 3, 2, 4), (0, 1), (0, 1)),
        ],
        "evaluations": [
            traced(torch.rand(2, 3, 2, 3), (0, 1), (0, 1, 1)),
            traced(torch.rand(1, 3, 2, 3), (0,), (0, 0)),
        ],
    }
    for said, wrong in others.items():
        for trace in wrong:
            with pytest.raises(HyperAlignError, match=rf"Trace 3 .*{said}"):
                spread_of([first, first, trace])
