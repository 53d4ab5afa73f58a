"""Schedulers and pipelines of diffusers around an attached model, against runs that are aligned by hand."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    UniPCMultistepScheduler,
)

from hyperalign.checkpoint import HyperAlign
from hyperalign.hosts.diffusers.adapter import Adapter
from hyperalign.hosts.diffusers.session import attach, denoiser_of
from hyperalign.schedule import Schedule, Variant

VARIANTS: tuple[Variant, ...] = ("S", "P", "I")
KEY = 0.5


@contextlib.contextmanager
def aligned_by_hand(pipe: Any, made: HyperAlign, variant: Variant) -> Iterator[list[float]]:
    """Aligns one run without a session: each step's weights come from that step, those of P and I last."""
    base, last = denoiser_of(pipe), 1.0 if "transformer" in pipe.components else 999.0
    adapter, signature = Adapter(base, made, Schedule(variant, (KEY,))), inspect.signature(base.forward)
    adapter.run_base = base.forward
    cores: torch.Tensor | None = None
    generated: list[float] = []

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        nonlocal cores
        call = dict(signature.bind(*args, **kwargs).arguments)
        call.pop("return_dict")
        u = float(call["timestep"].flatten()[0]) / last
        crossed = variant == "P" and bool(generated) and u <= KEY < generated[-1]
        if cores is None or variant == "S" or crossed:
            generated.append(u)
            prediction, cores = adapter.generate_and_forward(call)
            return (prediction,)
        return (adapter.forward(call, cores),)

    base.forward = forward
    adapter.begin_run()
    try:
        yield generated
    finally:
        adapter.end_run()
        del base.forward


@pytest.fixture
def compare(make_for: Any, draw: Any) -> Any:
    """Draws aligned by hand and by a session, after another run, and checks that they are equal."""

    def run(pipe: Any, mode: str = "prefix", **options: Any) -> None:
        made = make_for(pipe, mode=mode, schedule=Schedule("P", (KEY,)))
        base = draw(pipe, **options)
        for variant in VARIANTS:
            with aligned_by_hand(pipe, made, variant) as generated:
                expected = draw(pipe, **options)
            with attach(pipe, made, variant=variant) as session:
                draw(pipe, prompt=5, **options)
                assert torch.equal(draw(pipe, **options), expected), variant
                assert session.generations == len(generated)
            assert (expected - base).abs().max() > 1e-3
        assert torch.equal(draw(pipe, **options), base)

    return run


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DDIMScheduler, {}),
        (EulerAncestralDiscreteScheduler, {}),
        (HeunDiscreteScheduler, {"use_karras_sigmas": True}),
        (LCMScheduler, {}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (DPMSolverSinglestepScheduler, {"use_karras_sigmas": True}),
        (UniPCMultistepScheduler, {}),
    ],
)
def test_schedulers_of_every_kind(sd15_pipe: Any, compare: Any, kind: Any, settings: dict[str, Any]) -> None:
    sd15_pipe.scheduler = kind.from_config(sd15_pipe.scheduler.config, **settings)
    compare(sd15_pipe, steps=4)


def image(seed: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.rand(1, channels, 64, 64, generator=torch.Generator().manual_seed(seed))


def as_kind(pipe: Any, kind: Any, **more: Any) -> Any:
    """Returns a pipeline of another class with the same components, and a scheduler of its own."""
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
    other = kind(**{**pipe.components, **more, "scheduler": scheduler}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def test_image_to_image(sd15_pipe: Any, compare: Any) -> None:
    compare(as_kind(sd15_pipe, StableDiffusionImg2ImgPipeline), steps=5, image=image(), strength=0.8)


def test_inpainting(sd15_pipe: Any, compare: Any) -> None:
    pipe = as_kind(sd15_pipe, StableDiffusionInpaintPipeline)
    compare(pipe, steps=4, image=image(), mask_image=image(channels=1).round(), strength=1.0)


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_control_nets(sd15_pipe: Any, compare: Any, mode: str) -> None:
    """Their control is that of each step, and no perception takes it away."""
    net = ControlNetModel.from_unet(sd15_pipe.unet, conditioning_embedding_out_channels=(8,) * 4)
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.5)
    compare(as_kind(sd15_pipe, StableDiffusionControlNetPipeline, controlnet=net), mode, image=image())


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_adapters_control_reaches_the_step_it_is_for(sd15_pipe: Any, make_for: Any, mode: str) -> None:
    """The U-Net takes a T2I adapter's features out of their list while it runs."""
    unet, made = sd15_pipe.unet, make_for(sd15_pipe, mode=mode)
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 48, generator=generator)
    shapes = ((2, 32, 8, 8), (2, 64, 4, 4))
    control = [torch.randn(shape, generator=generator) for shape in shapes]

    def run() -> torch.Tensor:
        given = {"down_intrablock_additional_residuals": list(control)}
        return unet(x, torch.tensor(500), context, **given).sample

    def run_without() -> torch.Tensor:
        return unet(x, torch.tensor(500), context).sample

    with torch.no_grad(), attach(unet, made, variant="I") as session:
        if mode == "separate":  # what is perceived is without control
            run_without()
            reused = run()
            session.new_run()
            assert torch.equal(run(), reused)
        else:
            assert not torch.equal(run(), run_without())


class WholePAG:
    """Perturbed attention as one product for the whole batch, whose last part is perturbed."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        def heads(x_BNC: torch.Tensor) -> torch.Tensor:
            return x_BNC.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        kept = len(hidden_states) * (self.parts - 1) // self.parts
        both = torch.cat([attended[:kept], v[kept:]]).transpose(1, 2).flatten(2)
        return attn.to_out[0](both) + (hidden_states if attn.residual_connection else 0)


@pytest.mark.parametrize("merging", ["additive", "merged"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_perturbed_attention_runs_each_sample_with_its_own_weights(
    sd15_pipe: Any, make_for: Any, draw: Any, merging: Any, guidance_scale: float
) -> None:
    pipe, made = as_kind(sd15_pipe, StableDiffusionPAGPipeline), make_for(sd15_pipe)
    options = {"pag_scale": 3.0, "guidance_scale": guidance_scale, "rows": 2}
    base = draw(pipe, **options)
    pipe.set_pag_applied_layers("mid", (WholePAG(3), WholePAG(2)))
    with attach(pipe, made, merging=merging):
        expected = draw(pipe, **options)
    pipe.set_pag_applied_layers("mid")
    with attach(pipe, made, merging=merging) as session:
        torch.testing.assert_close(draw(pipe, **options), expected, rtol=1e-3, atol=1e-2)
        assert session.generations == 3
    assert torch.equal(draw(pipe, **options), base)
    assert (expected - base).abs().max() > 1


def test_an_attention_processor_that_bypasses_layers_is_told_once(
    sd15_pipe: Any, make_for: Any, draw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Passing:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states

    attention = sd15_pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.processor = Passing()
    with attach(sd15_pipe, made := make_for(sd15_pipe)):
        draw(sd15_pipe)
        (told,) = [record.getMessage() for record in caplog.records]
        targets = len(made.network.targets)
        assert f"reached only {targets - 4} of {targets} layers" in told
        draw(sd15_pipe)
        assert len(caplog.records) == 2


@pytest.mark.parametrize("pipe", ["flux"], indirect=True)
def test_image_to_image_of_a_transformer(pipe: Any, compare: Any, draw: Any) -> None:
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        shift_factor=0.0,
    )
    other = FluxImg2ImgPipeline(
        **{**pipe.components, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler()}
    )
    other.set_progress_bar_config(disable=True)
    compare(other, steps=4, image=image(), strength=0.8)
