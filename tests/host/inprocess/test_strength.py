"""Strength over the run and by block group, in the host's own samplers and as a node."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import math
from types import ModuleType

import pytest
import torch
from compiling import compiled, with_traceable_attention
from small_families import SHALLOW_SD15

from hyperalign.errors import HyperAlignError
from hyperalign.strength import GROUPS, StrengthCurve, groups_of

MODES = ["prefix", "separate"]
OFF = (0.0, 0.0, 0.0)


@pytest.fixture
def apply():
    from hyperalign.hosts.comfy.model import apply

    return apply


@pytest.fixture
def node(pack: ModuleType):
    """The node's class, and how the host calls it: each input a list."""
    HyperAlignStrength = importlib.import_module(f"{pack.__name__}.nodes.strength").HyperAlignStrength

    def run(floats=None, **widgets):
        values = {item.id: item.default for item in HyperAlignStrength.define_schema().inputs[:-1]} | widgets
        return HyperAlignStrength.execute(floats=floats, **{name: [value] for name, value in values.items()})

    return HyperAlignStrength, run


def relative(latents, expected):
    return float((latents - expected).abs().max() / expected.std())


@pytest.mark.parametrize(
    "curve", [StrengthCurve((0.0,)), StrengthCurve((0.0, 0.0)), StrengthCurve(groups=OFF)]
)
@pytest.mark.parametrize("variant", ["S", "I"])
def test_a_curve_of_zeros_is_the_base_bit_for_bit(tiny, sample, make_hyperalign, apply, runs, curve, variant):
    model = apply(tiny.model, make_hyperalign(variant=variant), strength_curve=curve)
    assert torch.equal(sample(model), sample(tiny.model))
    assert runs()[0]["generations"] == "0"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ["S", "P", "I"])
def test_a_curve_of_ones_is_no_curve_bit_for_bit(tiny, sample, make_hyperalign, apply, runs, mode, variant):
    hyperalign = make_hyperalign(mode=mode, variant=variant)
    curved = sample(apply(tiny.model, hyperalign, 0.7, strength_curve=StrengthCurve((1.0, 1.0, 1.0))))
    assert torch.equal(curved, sample(apply(tiny.model, hyperalign, 0.7)))
    assert runs()[0] == runs()[1]


def test_a_constant_curve_is_a_strength(tiny, sample, make_hyperalign, apply):
    hyperalign = make_hyperalign()
    expected = sample(apply(tiny.model, hyperalign, 0.5))
    assert (
        relative(sample(apply(tiny.model, hyperalign, strength_curve=StrengthCurve((0.5,)))), expected) < 1e-5
    )
    assert (
        relative(sample(apply(tiny.model, hyperalign, 2.0, strength_curve=StrengthCurve((0.25,)))), expected)
        < 1e-5
    )


def test_a_curves_window_is_the_nodes_window(tiny, sample, make_hyperalign, apply, runs):
    hyperalign = make_hyperalign()
    half = sample(apply(tiny.model, hyperalign, 1.0, 0.0, 0.5), steps=8)
    curved = sample(apply(tiny.model, hyperalign, strength_curve=StrengthCurve(end_percent=0.5)), steps=8)
    assert torch.equal(curved, half)
    assert runs()[0] == runs()[1]
    assert 0 < int(runs()[1]["generations"]) < 8


def test_both_windows_must_be_open(tiny, sample, make_hyperalign, apply):
    hyperalign = make_hyperalign()
    both = apply(tiny.model, hyperalign, 1.0, 0.0, 0.7, strength_curve=StrengthCurve(start_percent=0.3))
    assert torch.equal(sample(both, steps=8), sample(apply(tiny.model, hyperalign, 1.0, 0.3, 0.7), steps=8))


def test_a_curve_that_is_zero_at_first_leaves_the_first_steps_to_the_base(
    tiny, sample, make_hyperalign, apply, runs
):
    """0 up to the middle and 1 after it: the same as beginning in the middle."""
    curve = StrengthCurve((0.0, 0.0, *[1.0] * 199), start_percent=0.495)
    hyperalign = make_hyperalign(variant="I")
    curved = sample(apply(tiny.model, hyperalign, strength_curve=curve), steps=8)
    assert relative(curved, sample(apply(tiny.model, hyperalign, 1.0, 0.5), steps=8)) < 1e-6
    assert [run["generations"] for run in runs()] == ["1", "1"], "variant I writes where it first acts"


@pytest.mark.parametrize(("variant", "generations"), [("S", "5"), ("P", "2"), ("I", "1")])
def test_evaluations_at_zero_write_no_weights(
    tiny, sample, make_hyperalign, apply, runs, variant, generations
):
    """0 up to a third of the run: of 8 steps the last 5 act. P's key times are u = 0.8 and 0.5."""
    curve = StrengthCurve((0.0, 0.0, 1.0, 1.0))
    sample(apply(tiny.model, make_hyperalign(variant=variant), strength_curve=curve), steps=8)
    assert runs()[0]["generations"] == generations


def test_each_evaluation_gets_the_curves_strength_at_its_noise(
    tiny, sample, make_hyperalign, apply, monkeypatch
):
    """With the scheduler `normal` and as many values as steps, each step gets a value of its own."""
    from hyperalign.hosts import generation

    seen, scaled = [], generation.scaled

    def spy(cores, strengths):
        seen.append(float(strengths[0]))
        return scaled(cores, strengths)

    monkeypatch.setattr(generation, "scaled", spy)
    values = (1.0, -0.5, 2.0, 0.25)
    sample(apply(tiny.model, make_hyperalign(), strength_curve=StrengthCurve(values)), steps=4)
    assert seen == pytest.approx(values, abs=0.02)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ["S", "I"])
def test_group_strengths_are_cores_scaled_by_hand(
    tiny, sample, make_hyperalign, apply, monkeypatch, mode, variant
):
    from hyperalign.hosts.folding import Folding

    factors, hyperalign = (0.25, 0.0, -1.0), make_hyperalign(mode=mode, variant=variant)
    names = [target.name for target in hyperalign.header.targets]
    by_hand_M = torch.tensor([factors[group] for group in groups_of("tiny", names)])
    curved = sample(apply(tiny.model, hyperalign, strength_curve=StrengthCurve(groups=factors)))

    def fold(folding, cores_BMDA, *settings):
        return original(folding, cores_BMDA * by_hand_M[:, None, None], *settings)

    original = Folding.fold
    monkeypatch.setattr(Folding, "fold", fold)
    assert torch.equal(curved, sample(apply(tiny.model, hyperalign)))


def test_a_group_alone_moves_the_image_less_than_all(tiny, sample, make_hyperalign, apply):
    base, hyperalign = sample(tiny.model), make_hyperalign(mode="separate")
    alone = [tuple(float(group == other) for other in range(3)) for group in range(len(GROUPS))]
    moved = [
        relative(sample(apply(tiny.model, hyperalign, strength_curve=StrengthCurve(groups=groups))), base)
        for groups in (*alone, (1.0, 1.0, 1.0))
    ]
    assert 0 < min(moved[:3])
    assert max(moved[:3]) < moved[3]


@pytest.mark.parametrize("order", ["apply first", "compile first"])
def test_a_curve_with_zeros_works_compiled(shallow_unet, make_hyperalign, apply, order):
    hyperalign, curve = make_hyperalign(spec=SHALLOW_SD15), StrengthCurve((0.0, 0.0, 1.0, 0.0))
    unet = shallow_unet(SHALLOW_SD15)
    base, sample = with_traceable_attention(unet.model), unet.sample
    expected = sample(apply(base, hyperalign, strength_curve=curve))
    if order == "apply first":
        model = compiled(apply(base, hyperalign, strength_curve=curve))
    else:
        model = apply(compiled(base), hyperalign, strength_curve=curve)
    assert relative(sample(model), expected) < 1e-6
    assert relative(expected, sample(base)) > 1e-3


def test_another_model_sampling_shifts_the_curve(tiny, sample, make_hyperalign, apply):
    """A curve is found on the noise range of the model that samples, not of the one it was applied to."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = apply(tiny.model, make_hyperalign(), strength_curve=StrengthCurve((1.0, 0.0)))
    plain = sample(model)
    zsnr = ModelSamplingDiscrete().patch(model, "eps", True)[0]
    assert torch.isfinite(sample(zsnr)).all()
    assert torch.equal(sample(model), plain)


def test_windows_that_never_meet_are_refused(tiny, make_hyperalign, apply):
    with pytest.raises(HyperAlignError, match=r"acts from 0.6 to 1.0 .*from 0.0 to 0.5: never at once"):
        apply(tiny.model, make_hyperalign(), 1.0, 0.0, 0.5, strength_curve=StrengthCurve(start_percent=0.6))


def test_the_node_makes_a_curve_and_shows_it(node):
    result = node[1](start_strength=1.5, end_strength=0.5, ease="ease_in", end_percent=0.8, late_blocks=0.0)
    assert dataclasses.asdict(result.result[0]) == {
        "values": (1.5, 0.5), "ease": "ease_in", "start_percent": 0.0, "end_percent": 0.8,
        "groups": (1.0, 1.0, 0.0),
    }  # fmt: skip
    assert len(result.ui.as_dict()["images"]) == 1


def test_the_node_reads_a_list_and_then_ignores_the_ends(node):
    curve = node[1](mode="list", values="1, 0.5", start_strength=3.0, ease="ease_in").result[0]
    assert (curve.values, curve.ease) == ((1.0, 0.5), "linear")


@pytest.mark.parametrize("linked", [[1.0, 0.5, 0.0], [[1.0, 0.5, 0.0]], [(1, 0.5), 0.0]])
def test_floats_from_any_pack_take_the_place_of_the_mode(node, linked):
    """Some nodes send each float as an output of a list, some one output that is a list."""
    assert node[1](floats=linked, mode="ease").result[0].values == (1.0, 0.5, 0.0)


def test_a_hand_drawn_curve_is_followed(node):
    class Drawn:
        def interp(self, x):
            return 1 - x**2

    curve = node[1](floats=[Drawn()]).result[0]
    assert (curve.at(0.0), curve.at(1.0)) == (1.0, 0.0)
    assert curve.at(0.3) == pytest.approx(0.91, abs=1e-3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"floats": []}, "list has 0 values"),
        ({"floats": [[]]}, "list has 0 values"),
        ({"floats": [1.0, math.nan]}, "value 2 is nan"),
        ({"floats": ["1, 0"]}, "floats contains a str; expected numbers"),
        ({"mode": "list", "values": " "}, "list has 0 values"),
        ({"start_percent": 0.7, "end_percent": 0.2}, "start_percent is 0.7 and end_percent is 0.2"),
    ],
)
def test_the_node_refuses_what_is_no_curve(pack, node, inputs, message):
    errors = importlib.import_module(f"{pack.__name__}.hyperalign.errors")
    with pytest.raises(errors.HyperAlignError, match=message):
        node[1](**inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, None),
        ({"mode": "list", "values": "1, full"}, "'1, full'; expected numbers"),
        ({"mode": "list", "values": "1, nan"}, "value 2 is nan"),
        ({"mode": "ease", "values": "1, full"}, None),
        ({"mode": "list", "values": ""}, None),
        ({"mode": "keyframes"}, "keyframes"),
        ({"ease": "bounce"}, "bounce"),
    ],
)  # "" may be replaced by a connected list
def test_the_host_refuses_bad_widgets_before_anything_runs(node, monkeypatch, inputs, message):
    import execution

    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "HyperAlignStrength", node[0])
    widgets = {item.id: item.default for item in node[0].define_schema().inputs[:-1]} | inputs
    prompt = {"1": {"class_type": "HyperAlignStrength", "inputs": widgets}}
    valid, _, _, errors = asyncio.run(execution.validate_prompt("a prompt", prompt, None))
    assert valid == (message is None)
    if message is not None:
        assert all(message in error["details"] for error in errors["1"]["errors"])
