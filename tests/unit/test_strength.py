"""Strength over a run, and by group of blocks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperalign.errors import HyperAlignError
from hyperalign.families import flux, sd3, unet
from hyperalign.strength import (
    EASES,
    GROUPS,
    NoiseRange,
    StrengthCurve,
    TargetStrengths,
    eased,
    groups_of,
    interpolate,
    overlap,
    parse_values,
    scaled,
)

FAMILIES = {
    "tiny": unet.TINY,
    "sd15": unet.SD15,
    "sdxl": unet.SDXL,
    "flux": flux.FLUX_DEV,
    "sd3": sd3.SD35_MEDIUM,
}
ways = st.floats(0, 1)
strengths = st.floats(-4, 4)
lists = st.lists(strengths, min_size=1, max_size=30)


def linear_noise(percent):
    return 1 - percent


def shifted_noise(percent):
    """As flow models shift their times."""
    return 3 * (1 - percent) / (1 + 2 * (1 - percent))


@given(ease=st.sampled_from(EASES), one=ways, other=ways)
def test_every_ease_rises_from_0_to_1(ease, one, other):
    assert (eased(0.0, ease), eased(1.0, ease)) == (0.0, 1.0)
    low, high = sorted((one, other))
    assert eased(low, ease) <= eased(high, ease)


@given(values=lists)
def test_a_list_hits_each_of_its_values_evenly_spread(values):
    last = max(len(values) - 1, 1)
    for index, value in enumerate(values):
        assert interpolate(values, index / last) == pytest.approx(value, abs=1e-9)
    assert (interpolate(values, 0.0), interpolate(values, 1.0)) == (values[0], values[-1])


@given(values=lists, way=ways)
def test_a_list_stays_between_neighbouring_values(values, way):
    place = way * (len(values) - 1)
    pair = values[math.floor(place)], values[math.ceil(place)]
    assert min(pair) - 1e-9 <= interpolate(values, way) <= max(pair) + 1e-9


@given(values=lists, ease=st.sampled_from(EASES), percents=st.tuples(ways, ways), where=st.floats(-1, 2))
def test_a_curve_ends_at_its_ends_and_stays_there(values, ease, percents, where):
    start, end = sorted(percents)
    if start == end:
        return
    curve = StrengthCurve(tuple(values), ease, start, end)
    assert (curve.at(start), curve.at(end)) == (values[0], values[-1])
    if where <= start:
        assert curve.at(where) == values[0]
    if where >= end:
        assert curve.at(where) == values[-1]


@given(strength=strengths, percent=ways, ease=st.sampled_from(EASES))
def test_equal_ends_are_constant_to_the_bit(strength, percent, ease):
    assert StrengthCurve((strength, strength), ease).at(percent) == strength


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_cover_all_targets_of_each_family_once(family):
    names = [target.name for target in FAMILIES[family].targets("separate", 1)]
    groups = groups_of(family, names)
    assert len(groups) == len(names)
    assert sorted(set(groups)) == list(range(len(GROUPS)))


@pytest.mark.parametrize(
    ("family", "name", "group"),
    [
        ("sd15", "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q", "early"),
        ("sdxl", "mid_block.attentions.0.transformer_blocks.9.attn2.to_v", "middle"),
        ("sd15", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "late"),
        ("flux", "transformer_blocks.9.attn.to_q", "early"),
        ("flux", "transformer_blocks.10.attn.add_k_proj", "middle"),
        ("flux", "single_transformer_blocks.0.attn.to_q", "late"),
        ("sd3", "transformer_blocks.7.attn.to_q", "early"),
        ("sd3", "transformer_blocks.8.attn2.to_q", "middle"),
        ("sd3", "transformer_blocks.16.attn.to_q", "late"),
    ],
)  # FLUX has 19 double blocks, SD 3.5 medium 24 blocks
def test_the_groups_are_what_the_help_says(family, name, group):
    names = [target.name for target in FAMILIES[family].targets("separate", 1)]
    assert GROUPS[groups_of(family, names)[names.index(name)]] == group


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_is_in_the_same_group_in_both_modes(family):
    spec = FAMILIES[family]
    every = [target.name for target in spec.targets("separate", 4)]
    some = [target.name for target in spec.targets("prefix", 4)]
    of_all = dict(zip(every, groups_of(family, every), strict=True))
    assert groups_of(family, some) == [of_all[name] for name in some]


def test_a_layer_of_no_group_is_refused():
    with pytest.raises(HyperAlignError, match="layers of other_blocks belong to no group"):
        groups_of("flux", ["other_blocks.0.attn.to_q"])


def test_each_target_gets_the_curve_times_its_groups_factor():
    curve = StrengthCurve((2.0, 0.0), groups=(0.25, 0.5, 2.0))
    names = ["down_blocks.0.x", "mid_block.x", "up_blocks.0.x", "up_blocks.1.x"]
    strengths = TargetStrengths(curve, "tiny", names)
    assert strengths.at(1.0, linear_noise).tolist() == [0.5, 1.0, 4.0, 4.0]
    assert strengths.at(0.5, linear_noise).tolist() == [0.25, 0.5, 2.0, 2.0]
    assert not strengths.at(0.0, linear_noise).any()


def test_a_model_whose_noise_was_shifted_is_noticed():
    strengths = TargetStrengths(StrengthCurve((1.0, 0.0)), "tiny", ["mid_block.x"])
    assert strengths.at(0.75, linear_noise).item() == pytest.approx(0.75)
    assert strengths.at(0.75, shifted_noise).item() == pytest.approx(0.5, abs=1e-3)


def test_cores_are_scaled_by_target():
    cores_BMDA = torch.randn(3, 4, 2, 5)
    assert torch.equal(scaled(cores_BMDA, torch.ones(4)), cores_BMDA)
    assert torch.equal(scaled(cores_BMDA, torch.tensor([1.0, 2.0, 0.0, -1.0]))[:, 1], 2 * cores_BMDA[:, 1])


@given(percent=ways)
def test_a_noise_range_inverts_percent_to_sigma(percent):
    noise = NoiseRange.of(shifted_noise)
    assert noise.percent(shifted_noise(percent)) == pytest.approx(percent, abs=1e-3)


def test_a_noise_range_ends_at_0_and_1_whatever_the_host_answers_there():
    def discrete(percent):  # the host's answers for models with 1,000 timesteps
        return 1e9 if percent <= 0 else 0.0 if percent >= 1 else 0.03 + 14.6 * (1 - percent) ** 4

    noise = NoiseRange.of(discrete)
    assert noise.percent(14.63) == noise.percent(100.0) == 0.0
    assert noise.percent(0.03) == noise.percent(0.0) == 1.0
    assert noise.percent(0.03 + 14.6 / 16) == pytest.approx(0.5, abs=1e-6)


def test_windows_overlap_or_are_refused():
    assert overlap((0.0, 0.5), (0.2, 1.0)) == (0.2, 0.5)
    with pytest.raises(HyperAlignError, match=r"acts from 0.5 to 1.0 .*from 0.0 to 0.5: never at once"):
        overlap((0.0, 0.5), (0.5, 1.0))


@pytest.mark.parametrize("text", ["1, 0.5 ,-2", "1 0.5 -2", "1;0.5\n-2,"])
def test_numbers_are_read_from_a_text(text):
    assert parse_values(text) == (1.0, 0.5, -2.0)


def test_a_word_among_the_numbers_is_refused():
    with pytest.raises(HyperAlignError, match="'1, full'; expected numbers with commas between"):
        parse_values("1, full")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": ()}, "list has 0 values; expected at least 1 number"),
        ({"values": (1.0, math.nan)}, "value 2 is nan; expected a number"),
        ({"values": (math.inf,)}, "value 1 is inf"),
        ({"groups": (1.0, 1.0, math.nan)}, "block strength 3 is nan"),
        ({"ease": "bounce"}, "'bounce'; expected one of linear, ease_in"),
        ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent is 0.8 and end_percent is 0.2"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "start_percent < end_percent"),
        ({"end_percent": math.nan}, "end_percent is nan"),
    ],
)
def test_bad_curves_are_refused(options, message):
    with pytest.raises(HyperAlignError, match=message):
        StrengthCurve(**options)
