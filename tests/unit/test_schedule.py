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
