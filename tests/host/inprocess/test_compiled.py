"""A compiled MODEL stays compiled: no graph break and no compilation more than without HyperAlign."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import astuple, dataclass

import pytest
import torch
from compiling import compiled, with_traceable_attention
from small_families import (
    MIDDLE_SD15,
    SHALLOW_SD15,
    SHALLOW_SDXL,
    SIDE,
    conditioning,
    euler_in_comfyui,
)
from torch._dynamo.utils import counters

SIGMAS = [1.0, 0.9, 0.7, 0.45, 0.2, 0.0]


@dataclass(frozen=True)
class Compilations:
    """What torch._dynamo counted."""

    graphs: int
    breaks: int


def compilations(run: Callable[[], torch.Tensor]) -> tuple[Compilations, torch.Tensor]:
    torch._dynamo.reset()
    counters.clear()
    result = run()
    found = Compilations(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    torch._dynamo.reset()
    return found, result


def check(model, hyperalign, sample, alone: dict[str, Compilations], family: str) -> None:
    from hyperalign.hosts.comfy.model import apply

    model = with_traceable_attention(model)
    base = sample(model)
    if family not in alone:
        alone[family], _ = compilations(lambda: sample(compiled(model)))
    expected = sample(apply(model, hyperalign))
    ours, found = compilations(lambda: sample(compiled(apply(model, hyperalign))))
    assert alone[family].graphs >= 1
    assert all(mine <= bases for mine, bases in zip(astuple(ours), astuple(alone[family]), strict=True))
    torch.testing.assert_close(found / expected.std(), expected / expected.std(), atol=1e-4, rtol=0)
    assert (found - base).abs().max() > 1e-2 * base.std()


@pytest.fixture(scope="module")
def alone() -> dict[str, Compilations]:
    """What the base models alone take, by family."""
    return {}


@pytest.mark.parametrize(
    ("mode", "variant"), [("prefix", "S"), ("prefix", "P"), ("prefix", "I"), ("separate", "S")]
)
def test_a_compiled_transformer_stays_as_compiled(family, make_hyperalign, alone, mode, variant):
    spec, _, theirs, _, _ = family
    hyperalign = make_hyperalign(spec=spec, mode=mode, variant=variant, perception_blocks=2)
    _, _, positive = conditioning(spec)
    noise = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(12))
    check(
        theirs, hyperalign, lambda model: euler_in_comfyui(model, noise, positive, SIGMAS), alone, spec.family
    )


@pytest.mark.parametrize("variant", ["S", "P", "I"])
@pytest.mark.parametrize("spec", [SHALLOW_SD15, SHALLOW_SDXL], ids=["sd15", "sdxl"])
def test_a_compiled_unet_stays_as_compiled_with_guidance(shallow_unet, make_hyperalign, alone, spec, variant):
    unet = shallow_unet(spec)
    check(unet.model, make_hyperalign(spec=spec, variant=variant), unet.sample, alone, spec.family)


def test_the_tiny_model_stays_as_compiled(tiny, sample, make_hyperalign, alone):
    check(tiny.model, make_hyperalign(), lambda model: sample(model, steps=5), alone, "tiny")


def test_further_runs_compile_nothing_more(tiny, sample, make_hyperalign):
    from hyperalign.hosts.comfy.model import apply

    model = compiled(apply(with_traceable_attention(tiny.model), make_hyperalign()))
    once, _ = compilations(lambda: sample(model, steps=2))
    thrice, _ = compilations(lambda: [sample(model, steps=2) for _ in range(3)][-1])
    assert thrice == once


@pytest.mark.skipif("HYPERALIGN_INDUCTOR" not in os.environ, reason="minutes of g++: HYPERALIGN_INDUCTOR=1")
def test_inductor_compiles_as_much_and_gives_the_same(shallow_unet, make_hyperalign):
    from hyperalign.hosts.comfy.model import apply

    unet = shallow_unet(MIDDLE_SD15)
    model = with_traceable_attention(unet.model)
    alone, _ = compilations(lambda: unet.sample(compiled(model, "inductor")))
    aligned = apply(model, make_hyperalign(spec=MIDDLE_SD15))
    expected = unet.sample(aligned)
    ours, found = compilations(lambda: unet.sample(compiled(aligned, "inductor")))
    assert all(mine <= bases for mine, bases in zip(astuple(ours), astuple(alone), strict=True))
    # Inductor's kernels round in another way: they fuse, and approximate exp and the like.
    torch.testing.assert_close(found / expected.std(), expected / expected.std(), atol=2e-3, rtol=0)
    assert (found - unet.sample(model)).abs().max() > 1e-2 * expected.std()
