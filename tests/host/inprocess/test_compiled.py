"""A compiled MODEL stays compiled: no graph break and no compilation more than without HyperAlign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import pytest
import torch
from compiling import compiled, with_traceable_attention
from small_families import SIDE, SMALL_SD15, SMALL_SDXL, conditioning, euler_in_comfyui, unet_models
from torch._dynamo.utils import counters

SHALLOW_SD15 = replace(SMALL_SD15, block_out_channels=(32, 64), layers_per_block=1, transformer_layers=(1, 0))
SHALLOW_SDXL = replace(SMALL_SDXL, block_out_channels=(32, 64), layers_per_block=1, transformer_layers=(0, 1))
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
def test_a_compiled_unet_stays_as_compiled(comfy, make_hyperalign, alone, spec, variant):
    torch.manual_seed(6)
    with torch.no_grad():
        _, theirs = unet_models(spec)
    hyperalign = make_hyperalign(spec=spec, variant=variant)
    context, pooled = torch.randn(1, 7, spec.cross_attention_dim), torch.randn(1, 1280)
    sizes = {"height": 64, "width": 64, "crop_h": 0, "crop_w": 0, "target_height": 64, "target_width": 64}
    positive = [[context, {"pooled_output": pooled, **sizes}]]
    noise, sigmas = torch.randn(2, 4, 8, 8), [14.6, 7.0, 3.0, 1.0, 0.4, 0.0]
    check(
        theirs, hyperalign, lambda model: euler_in_comfyui(model, noise, positive, sigmas), alone, spec.family
    )


@pytest.mark.parametrize("variant", ["S", "P", "I"])
def test_guided_sampling_of_the_tiny_model_stays_as_compiled(tiny, sample, make_hyperalign, alone, variant):
    hyperalign = make_hyperalign(variant=variant)
    check(tiny.model, hyperalign, lambda model: sample(model, steps=5), alone, "tiny")
