"""Each mistake gets one sentence before anything is sampled."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from hyperalign.checkpoint import save
from hyperalign.errors import HyperAlignError
from hyperalign.families.unet import TINY


@pytest.fixture
def apply():
    from hyperalign.hosts.comfy.model import apply

    return apply


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_a_strength_that_is_no_number(tiny, make_hyperalign, apply, strength):
    with pytest.raises(HyperAlignError, match="strength is .*expected a number, 0 for off"):
        apply(tiny.model, make_hyperalign(), strength=strength)


@pytest.mark.parametrize("window", [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, math.nan)])
def test_percents_out_of_order(tiny, make_hyperalign, apply, window):
    with pytest.raises(HyperAlignError, match="expected 0 <= start_percent < end_percent <= 1"):
        apply(tiny.model, make_hyperalign(), 1.0, *window)


def test_p_without_key_times(tiny, make_hyperalign, apply):
    with pytest.raises(HyperAlignError, match="needs key times"):
        apply(tiny.model, make_hyperalign(variant="S"), variant="P")


def test_another_family(tiny, make_hyperalign, apply):
    spec = dataclasses.replace(TINY, family="sd15")
    with pytest.raises(HyperAlignError, match="trained for .*'sd15'.*'tiny'.*Load a hypernetwork"):
        apply(tiny.model, make_hyperalign(spec=spec), 1.0)


def test_other_widths(tiny, make_hyperalign, apply):
    spec = dataclasses.replace(TINY, block_out_channels=(64, 128, 256))
    with pytest.raises(
        HyperAlignError, match=r"block_out_channels is \[64, 128, 128\] and should be \[64, 128, 256\]"
    ):
        apply(tiny.model, make_hyperalign(spec=spec))


@pytest.mark.parametrize("kind", ["chroma", "flux2", "wan2.1"])
def test_a_model_of_a_kind_nobody_taught_us(make_hyperalign, apply, kind):
    other = SimpleNamespace(
        model=SimpleNamespace(model_config=SimpleNamespace(unet_config={"image_model": kind}))
    )
    with pytest.raises(HyperAlignError, match="HyperAlign knows SD 1.5, SDXL, FLUX.1"):
        apply(other, make_hyperalign())


def test_a_layer_the_model_lacks(tiny, make_hyperalign, apply):
    from hyperalign.hosts.comfy.model import hosted

    hyperalign = make_hyperalign().hyperalign
    lying = dataclasses.replace(hyperalign.header.targets[0], name="mid_block.attentions.7.to_q")
    header = dataclasses.replace(hyperalign.header, targets=(lying, *hyperalign.header.targets[1:]))
    with pytest.raises(HyperAlignError, match=r"no layer mid_block.attentions.7.to_q"):
        apply(tiny.model, hosted(dataclasses.replace(hyperalign, header=header)))


def test_bad_files_are_refused_and_the_base_stays_as_it_was(tiny, sample, make_hyperalign, tmp_path):
    from hyperalign.hosts.comfy.model import load

    before = sample(tiny.model)
    good = tmp_path / "good.safetensors"
    hyperalign = make_hyperalign().hyperalign
    save(good, hyperalign.network, hyperalign.header)
    truncated, foreign = tmp_path / "truncated.safetensors", tmp_path / "foreign.safetensors"
    truncated.write_bytes(good.read_bytes()[:-100])
    foreign.write_bytes(b"PK\x03\x04 a zip")
    poisoned = tmp_path / "nan.safetensors"
    with torch.no_grad():
        hyperalign.network.b_aux[0].fill_(math.nan)
    save(poisoned, hyperalign.network, hyperalign.header)
    for path, message in (
        (truncated, "not a whole safetensors file"),
        (foreign, "not a whole safetensors file"),
        (poisoned, "NaN"),
        (tmp_path / "missing.safetensors", "no file"),
    ):
        with pytest.raises(HyperAlignError, match=message):
            load(path)
    assert torch.equal(sample(tiny.model), before)


def test_a_word_outside_the_vocabulary(tiny):
    with pytest.raises(HyperAlignError, match="'zebra'.*does not know"):
        tiny.condition("a zebra")
