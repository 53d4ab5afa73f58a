"""LoRA files that diffusers loads, fuses and unloads, before HyperAlign is attached and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hyperalign.hosts.diffusers.session import attach, denoiser_of

pytestmark = pytest.mark.parametrize("pipe", ["sd15", "flux"], indirect=True)
LAYERS = ("to_q", "to_v", "to_out.0", "net.2")
CLOSE = {"rtol": 1e-3, "atol": 1e-2}
"""Fusing and unfusing round the weights; the latents are some hundreds."""


def load_lora(pipe: Any) -> None:
    """Loads a LoRA for attention and feed-forward layers, those that are adapted among them."""
    name = "unet" if "unet" in pipe.components else "transformer"
    generator = torch.Generator().manual_seed(9)
    state: dict[str, torch.Tensor] = {}
    for path, module in denoiser_of(pipe).named_modules():
        if isinstance(module, nn.Linear) and path.endswith(LAYERS):
            for part, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2))):
                state[f"{name}.{path}.lora_{part}.weight"] = 0.2 * torch.randn(shape, generator=generator)
    pipe.load_lora_weights(state)


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_a_lora_may_be_loaded_and_unloaded_before_and_after(
    pipe: Any, make_for: Any, draw: Any, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    made = make_for(pipe, mode=mode)
    base = draw(pipe)
    with attach(pipe, made) as session:
        aligned = draw(pipe)
        load_lora(pipe)
        both = draw(pipe)
        pipe.unload_lora_weights()
        assert torch.equal(draw(pipe), aligned)
    assert torch.equal(draw(pipe), base)
    load_lora(pipe)
    with_lora = draw(pipe)
    with attach(pipe, made) as session:
        assert torch.equal(draw(pipe), both)
        assert session.generations == 3
        pipe.unload_lora_weights()
        assert torch.equal(draw(pipe), aligned)
        load_lora(pipe)
        assert torch.equal(draw(pipe), both)
    assert torch.equal(draw(pipe), with_lora)
    different = [aligned, both, base, with_lora]
    assert len({image.double().sum().item() for image in different}) == 4
    assert "reached only" not in caplog.text


@pytest.mark.parametrize("merging", ["additive", "merged"])
def test_a_lora_may_be_fused(pipe: Any, make_for: Any, draw: Any, merging: Any) -> None:
    made = make_for(pipe)
    base = draw(pipe)
    with attach(pipe, made, merging=merging):
        aligned = draw(pipe)
        load_lora(pipe)
        both = draw(pipe)
        pipe.fuse_lora()
        fused = draw(pipe)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        torch.testing.assert_close(draw(pipe), aligned, **CLOSE)
    torch.testing.assert_close(draw(pipe), base, **CLOSE)
    torch.testing.assert_close(fused, both, **CLOSE)
    load_lora(pipe)
    pipe.fuse_lora()
    with_lora = draw(pipe)
    with attach(pipe, made, merging=merging):
        torch.testing.assert_close(draw(pipe), both, **CLOSE)
        pipe.unload_lora_weights()  # which leaves it in the weights
        torch.testing.assert_close(draw(pipe), both, **CLOSE)
    assert torch.equal(draw(pipe), with_lora)


@pytest.mark.parametrize("merging", ["additive", "merged"])
@pytest.mark.parametrize("change", [load_lora, lambda pipe: pipe.unload_lora_weights()])
def test_a_lora_may_come_and_go_within_a_run(
    pipe: Any, make_for: Any, draw: Any, caplog: pytest.LogCaptureFixture, change: Callable[[Any], None],
    merging: Any,
) -> None:  # fmt: skip
    """A run's weights stay: what changes is the LoRA, as in a run that fades it by its own scale."""
    made = make_for(pipe)
    scale = float(change is load_lora)

    def fade(pipeline: Any, step: int, *_: Any) -> dict[str, Any]:
        pipeline.set_adapters(["default_0"], scale if step >= 1 else 1.0 - scale)
        return {}

    def exchange(pipeline: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            change(pipeline)
        return {}

    load_lora(pipe)
    pipe.set_adapters(["default_0"], 1.0 - scale)
    with attach(pipe, made, variant="I", merging=merging):
        expected = draw(pipe, callback_on_step_end=fade)
    if change is load_lora:
        pipe.unload_lora_weights()
    else:
        pipe.set_adapters(["default_0"], 1.0)
    with attach(pipe, made, variant="I", merging=merging) as session:
        torch.testing.assert_close(draw(pipe, callback_on_step_end=exchange), expected, **CLOSE)
        assert session.generations == 1
    assert "reached only" not in caplog.text
