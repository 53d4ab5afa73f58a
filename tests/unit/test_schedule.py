"""When weights are generated anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError
from hyperalign.schedule import Schedule, curvature, find_key_times, relative_distance

times = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5, unique=True).map(
    lambda t: tuple(sorted(t, reverse=True))
)
runs = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40).map(lambda t: sorted(t, reverse=True))


def generations(schedule: Schedule, us: list[float]) -> int:
    count, segment = 0, None
    for u in us:
        if schedule.is_due(u, segment):
            count, segment = count + 1, schedule.segment(u)
    return count


@given(times, st.floats(0.0, 1.0))
def test_segments_partition_the_noise_range(keys: tuple[float, ...], u: float) -> None:
    schedule = Schedule("P", keys)
    edges = (float("inf"), *keys, -1.0)
    inside = [i for i in range(len(keys) + 1) if edges[i + 1] < u <= edges[i]]
    assert inside == [schedule.segment(u)] or u in keys


@given(runs)
def test_s_writes_at_every_evaluation_and_i_once(us: list[float]) -> None:
    assert generations(Schedule("S"), us) == len(us)
    assert generations(Schedule("I"), us) == 1


@given(times, runs)
def test_p_writes_once_for_each_segment_a_run_enters(keys: tuple[float, ...], us: list[float]) -> None:
    schedule = Schedule("P", keys)
    assert generations(schedule, us) == len({schedule.segment(u) for u in us})


@given(times, st.floats(0.0, 1.0))
def test_weights_in_use_were_written_in_their_own_segment(keys: tuple[float, ...], u: float) -> None:
    schedule = Schedule("P", keys)
    written = schedule.generation_time(u)
    assert written >= u
    assert schedule.segment(written) == schedule.segment(u)


def test_going_back_up_in_noise_does_not_write_again() -> None:
    schedule = Schedule("P", (0.5,))
    assert schedule.is_due(0.4, 0)
    assert not schedule.is_due(0.6, 1)


@pytest.mark.parametrize("keys", [(0.2, 0.5), (1.0,), (0.0,), (float("nan"),), (0.5, 0.5), ()])
def test_wrong_key_times_are_refused(keys: tuple[float, ...]) -> None:
    with pytest.raises(HyperAlignError, match=r"[Kk]ey times"):
        Schedule("P", keys)


def test_unknown_variant_is_refused() -> None:
    with pytest.raises(HyperAlignError, match="expected one of S, P, I"):
        Schedule("X")  # pyright: ignore[reportArgumentType]


def test_relative_distance_ignores_brightness_and_contrast() -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert relative_distance(3 * x + 1, x).max() < 1e-4
    assert relative_distance(-x, x).min() > 1.9


def test_curvature_is_greatest_at_the_bend() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0])
    assert int(curvature(values).argmax()) == 3
    assert curvature(torch.arange(5.0)).abs().max() == 0


def test_key_times_sit_at_the_bends_and_keep_apart() -> None:
    u = [0.95 - 0.05 * i for i in range(16)]
    log_distance = [-0.3 * abs(i - 4) - 0.6 * abs(i - 10) for i in range(16)]
    found = find_key_times([2.718281828**d for d in log_distance], u, 2)
    assert found == pytest.approx((u[4], u[10]))


def test_key_times_need_a_curve() -> None:
    with pytest.raises(HyperAlignError, match="at least 3"):
        find_key_times([0.1, 0.2], [0.5, 0.4], 1)


def test_a_key_time_belongs_to_the_segment_below_it() -> None:
    schedule = Schedule("P", (0.7, 0.3))
    assert [schedule.segment(u) for u in (1.0, 0.71, 0.7, 0.31, 0.3, 0.0)] == [0, 0, 1, 1, 2, 2]
    assert [Schedule(variant, (0.7, 0.3)).segment(0.1) for variant in ("S", "I")] == [0, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "times"),
    [
        (Schedule("S", (0.5,)), (1.0, 0.8, 0.5, 0.2)),
        (Schedule("I", (0.5,)), (1.0, 1.0, 1.0, 1.0)),
        (Schedule("P", (0.9, 0.5)), (1.0, 0.9, 0.5, 0.5)),
    ],
)
def test_weights_are_written_now_at_the_last_key_time_or_at_the_start(
    schedule: Schedule, times: tuple[float, ...]
) -> None:
    assert tuple(schedule.generation_time(u) for u in (1.0, 0.8, 0.5, 0.2)) == times


def test_weights_are_due_when_there_are_none_and_when_their_segment_ended() -> None:
    schedule = Schedule("P", (0.5,))
    assert [schedule.is_due(0.9, segment) for segment in (None, 0, 1)] == [True, False, False]
    assert [schedule.is_due(0.5, segment) for segment in (None, 0, 1)] == [True, True, False]
    assert Schedule("S").is_due(0.5, 0) and not Schedule("I").is_due(0.0, 0)


def test_s_and_i_need_no_key_times_and_p_takes_any_inside() -> None:
    assert Schedule("S").key_times == Schedule("I").key_times == ()
    assert Schedule("P", (0.999, 0.001)).key_times == (0.999, 0.001)


@pytest.mark.parametrize("keys", [(float("inf"),), (-0.5,), (1.5,), (0.5, 1.0), (0.5, 0.5, 0.2), (0.2, 0.3)])
@pytest.mark.parametrize("variant", ["S", "P", "I"])
def test_key_times_must_fall_inside_the_run_whatever_the_variant(variant, keys: tuple[float, ...]) -> None:
    with pytest.raises(HyperAlignError, match="falling"):
        Schedule(variant, keys)


def test_a_relative_distance_by_hand() -> None:
    """Rows of two channels of 1 x 2 pixels: normalised to -+1/sqrt(2) by the deviation over n - 1."""
    x = torch.tensor([[[[0.0, 4.0]], [[1.0, 3.0]]], [[[5.0, 1.0]], [[1.0, 3.0]]]])
    before = torch.tensor([[[[0.0, 2.0]], [[9.0, 1.0]]], [[[0.0, 1.0]], [[0.0, 1.0]]]])
    # In each row one channel of two is turned round: sqrt(4 * 1/2 * 2) / sqrt(2) = sqrt(2).
    assert relative_distance(x, before).tolist() == pytest.approx([2**0.5, 2**0.5], abs=1e-4)
    assert relative_distance(x, before, eps=1e9).tolist() == pytest.approx(distances(x, before), rel=1e-4)


def distances(x: torch.Tensor, before: torch.Tensor) -> list[float]:
    """With an enormous eps the deviations do not count: only the means are taken off."""
    found = []
    for row, other in zip(x.tolist(), before.tolist(), strict=True):
        now, then = ([[v - sum(c[0]) / 2 for v in c[0]] for c in one] for one in (row, other))
        change = sum((a - b) ** 2 for p, q in zip(now, then, strict=True) for a, b in zip(p, q, strict=True))
        found.append((change / sum(b * b for q in then for b in q)) ** 0.5)
    return found


def test_a_curvature_by_hand() -> None:
    """|d''| / (1 + d'^2)^1.5 with central differences: d' = 2, 4, 2.5 and d'' = 2, 2, -5."""
    found = curvature(torch.tensor([0.0, 1.0, 4.0, 9.0, 9.0], dtype=torch.float64))
    expected = [0.0, 2 / 5**1.5, 2 / 17**1.5, 5 / 7.25**1.5, 0.0]
    assert found.tolist() == pytest.approx(expected)


def curve(bends: dict[int, float], length: int = 12) -> tuple[list[float], list[float]]:
    """Distances whose logarithm is 0 but for peaks at given evaluations, and falling times."""
    u = [1.0 - (i + 0.5) / length for i in range(length)]
    return [2.718281828 ** bends.get(i, 0.0) for i in range(length)], u


def test_key_times_lie_at_least_the_gap_after_the_start() -> None:
    """The sharpest bend is one evaluation after the start: too near for the usual gap, not for a gap of 1."""
    distances_N, u = curve({1: 0.5, 7: 0.4})
    assert find_key_times(distances_N, u, 1) == (u[7],)
    assert find_key_times(distances_N, u, 1, min_gap=1) == (u[1],)
    distances_N, u = curve({2: 0.5, 7: 0.4})
    assert find_key_times(distances_N, u, 1) == (u[2],)
    assert find_key_times(distances_N, u, 1, min_gap=3) == (u[7],)


def test_key_times_lie_at_least_the_gap_from_each_other() -> None:
    distances_N, u = curve({5: 0.9, 7: 0.6, 9: 0.3})
    assert find_key_times(distances_N, u, 2) == (u[5], u[7])
    assert find_key_times(distances_N, u, 2, min_gap=3) == (u[5], u[8])


def test_key_times_are_as_many_as_asked_for_and_fall() -> None:
    distances_N, u = curve({3: 0.2, 6: 0.3, 9: 0.4})
    assert find_key_times(distances_N, u, 1) == (u[9],)
    assert find_key_times(distances_N, u, 2) == (u[6], u[9])
    assert find_key_times(distances_N, u, 3) == (u[3], u[6], u[9])


def test_pure_noise_and_the_finished_image_are_no_key_times() -> None:
    distances_N, u = curve({3: 0.9, 6: 0.4, 9: 0.8})
    u[3], u[9] = 1.0, 0.0
    assert find_key_times(distances_N, u, 1) == (u[6],)


def test_a_distance_of_nothing_counts_as_a_very_small_one() -> None:
    u = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    assert find_key_times([1.0, 1.0, 1.0, 0.0, 1.0, 1.0], u, 1) == (0.6,)


@pytest.mark.parametrize(("distances_N", "u"), [([0.1, 0.2, 0.1], [0.5, 0.4]), ([0.1, 0.2], [0.9, 0.5, 0.4])])
def test_key_times_need_a_time_for_each_distance(distances_N: list[float], u: list[float]) -> None:
    with pytest.raises(HyperAlignError, match="same number"):
        find_key_times(distances_N, u, 1)


def test_three_points_are_a_curve() -> None:
    assert find_key_times([0.1, 0.9, 0.1], [0.9, 0.6, 0.3], 1, min_gap=1) == (0.6,)


def test_a_flat_channel_counts_little_and_stays_finite() -> None:
    """Its deviation is 0: what is left of rounding is divided by eps and not by nothing."""
    flat, x = torch.full((1, 1, 2, 2), 3.0), torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    assert relative_distance(torch.cat([flat, x], 1), torch.cat([flat, x], 1)).tolist() == [0.0]
    by_one = relative_distance(x, x.flip(-1), eps=1.0) / relative_distance(x, x.flip(-1), eps=0.0)
    assert by_one.item() == pytest.approx(1.0)  # eps scales both alike
    deviations = [x.std().item(), 2 * x.std().item()]
    parts = [(deviations[0] + 1) ** -2, 4 * (deviations[1] + 1) ** -2]
    both, turned = torch.cat([x, 2 * x], 1), torch.cat([x.flip(-1), 2 * x], 1)
    centred = x - x.mean()
    change = (centred - centred.flip(-1)).square().sum().item() * parts[0]
    whole = centred.square().sum().item() * sum(parts)
    assert relative_distance(both, turned, eps=1.0).item() == pytest.approx((change / whole) ** 0.5, rel=1e-5)
