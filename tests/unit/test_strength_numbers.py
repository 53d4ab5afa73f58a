"""The strength curve's numbers by hand: eases, settings, the edges of the run and the noise range's table."""

from __future__ import annotations

import pytest

from hyperalign.errors import HyperAlignError
from hyperalign.strength import NoiseRange, StrengthCurve, TargetStrengths, eased, groups_of


@pytest.mark.parametrize(
    ("ease", "ways"),
    [
        ("linear", (0.0, 0.25, 0.5, 1.0)),
        ("ease_in", (0.0, 1 / 16, 1 / 4, 1.0)),
        ("ease_out", (0.0, 7 / 16, 3 / 4, 1.0)),
        ("ease_in_out", (0.0, (1 - 0.5**0.5) / 2, 1 / 2, 1.0)),
    ],
)
def test_eases_by_hand(ease, ways: tuple[float, ...]) -> None:
    assert [eased(way, ease) for way in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(ways)


def test_a_curve_nobody_set_is_1_everywhere() -> None:
    curve = StrengthCurve()
    assert (curve.values, curve.groups, curve.ease, curve.window) == (
        (1.0,),
        (1.0,) * 3,
        "linear",
        (0.0, 1.0),
    )
    names = ["down_blocks.0.x", "mid_block.x", "up_blocks.0.x"]
    assert TargetStrengths(curve, "tiny", names).at(0.3, lambda percent: 1 - percent).tolist() == [1.0] * 3


def test_a_window_is_travelled_from_its_start_to_its_end() -> None:
    curve = StrengthCurve((2.0, 0.0, 4.0), start_percent=0.2, end_percent=0.6)
    assert curve.window == (0.2, 0.6)
    found = [curve.at(percent) for percent in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)]
    assert found == pytest.approx([2, 2, 1, 0, 2, 4, 4])


@pytest.mark.parametrize("window", [(-0.1, 0.5), (0.5, 1.1)])
def test_a_window_beyond_the_run_is_refused(window: tuple[float, float]) -> None:
    with pytest.raises(HyperAlignError, match="start_percent"):
        StrengthCurve(start_percent=window[0], end_percent=window[1])


def test_a_stack_without_numbers_is_its_own_first_block() -> None:
    """Two blocks: the first lies at 0 and the second at 1/2 of the stack."""
    names = ["transformer_blocks.x.attn", "transformer_blocks.1.attn", "single_transformer_blocks.0.attn"]
    assert groups_of("flux", names) == [0, 1, 2]
    assert groups_of("sd3", [f"transformer_blocks.{block}.x" for block in range(6)]) == [0, 0, 1, 1, 2, 2]
    assert groups_of("flux", ["transformer_blocks.0.x"]) == [0]


def test_a_noise_range_is_tabulated_at_129_points_falling_to_0() -> None:
    noise = NoiseRange.of(lambda percent: 10 * (1 - percent))
    assert len(noise.sigmas) == len(noise.percents) == 129
    assert (noise.percents[0], noise.percents[64], noise.percents[128]) == (1.0, 0.5, 0.0)
    assert noise.sigmas[64] == 5.0
    # Nearest the ends, where a neighbour of the end would answer for it:
    for sigma in (0.01, 0.05, 9.95, 9.99):
        assert noise.percent(sigma) == pytest.approx(1 - sigma / 10, abs=1e-6)
    assert (noise.percent(0.0), noise.percent(10.0), noise.percent(noise.sigmas[-1])) == (1.0, 0.0, 0.0)


def test_a_noise_range_is_known_by_its_middle() -> None:
    noise = NoiseRange.of(lambda percent: 10 * (1 - percent))
    assert noise.is_of(lambda percent: 10 * (1 - percent))
    assert not noise.is_of(lambda percent: 10 * (1 - percent) ** 2)
