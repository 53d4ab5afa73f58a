"""Offload, caches and moves of diffusers, before HyperAlign is attached and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_faster_cache, apply_pyramid_attention_broadcast

import hyperalign
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers.session import denoiser_of
from hyperalign.schedule import Schedule

BOTH = pytest.mark.parametrize("pipe", ["sd15", "flux"], indirect=True)
FLUX = pytest.mark.parametrize("pipe", ["flux"], indirect=True)
FIRST = pytest.mark.parametrize("attach_first", [True, False])
CPU = torch.device("cpu")


def by_blocks(pipe: Any) -> None:
    denoiser: Any = denoiser_of(pipe)
    denoiser.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def by_leaves(pipe: Any) -> None:
    denoiser: Any = denoiser_of(pipe)
    denoiser.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def sequentially(pipe: Any) -> None:
    """As `enable_sequential_cpu_offload` does to each model, which itself asks for an accelerator."""
    cpu_offload(denoiser_of(pipe), execution_device=CPU)


OFFLOADS = pytest.mark.parametrize(
    ("offload", "mode"), [(by_blocks, "prefix"), (by_leaves, "separate"), (sequentially, "prefix")]
)


@BOTH
@FIRST
@OFFLOADS
def test_offload_keeps_the_alignment(
    pipe: Any, make_for: Any, draw: Any, offload: Callable[[Any], None], attach_first: bool, mode: str
) -> None:
    made = make_for(pipe, mode=mode)
    base = draw(pipe)
    with hyperalign.attach(pipe, made):
        expected = draw(pipe)
    if attach_first:
        session = hyperalign.attach(pipe, made)
        offload(pipe)
    else:
        offload(pipe)
        session = hyperalign.attach(pipe, made)
    for _ in range(2):
        assert torch.equal(draw(pipe), expected)
    assert session.generations == 3
    session.detach()
    assert torch.equal(draw(pipe), base)


@BOTH
def test_attaching_again_replaces_below_hooks(pipe: Any, make_for: Any, draw: Any) -> None:
    base = draw(pipe)
    with hyperalign.attach(pipe, make_for(pipe, seed=5)):
        expected = draw(pipe)
    hyperalign.attach(pipe, make_for(pipe, seed=4))
    by_blocks(pipe)
    with hyperalign.attach(pipe, make_for(pipe, seed=5)):
        assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), base)


@BOTH
def test_the_alignment_outlives_hooks_that_are_taken_off(pipe: Any, make_for: Any, draw: Any) -> None:
    base = draw(pipe)
    with hyperalign.attach(pipe, made := make_for(pipe)):
        expected = draw(pipe)
    by_blocks(pipe)
    with hyperalign.attach(pipe, made):
        for name in ("lazy_prefetch_group_offloading", "group_offloading"):
            denoiser_of(pipe)._diffusers_hook.remove_hook(name, recurse=True)  # pyright: ignore
        assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), base)


@BOTH
def test_a_pipeline_may_change_its_precision(pipe: Any, make_for: Any, draw: Any) -> None:
    made = make_for(pipe)
    base = draw(pipe)
    with hyperalign.attach(pipe, made):
        expected = draw(pipe)
    session = hyperalign.attach(pipe, made)
    pipe.to(torch.bfloat16)
    aligned = draw(pipe)
    session.detach()
    half = draw(pipe)
    with hyperalign.attach(pipe, made):
        assert torch.equal(draw(pipe), aligned) and aligned.dtype == torch.bfloat16
    assert torch.equal(draw(pipe), half) and not torch.equal(aligned, half)
    assert not torch.equal(half.float(), base) and expected.dtype == torch.float32


def test_a_base_model_may_change_its_device(sd15_pipe: Any, make_for: Any) -> None:
    """The meta device stands for an accelerator."""
    made = make_for(sd15_pipe)
    with hyperalign.attach(sd15_pipe.unet, made) as session:
        sd15_pipe.unet(torch.zeros(1, 4, 8, 8), 999, torch.zeros(1, 8, 48))
        sd15_pipe.unet.to("meta")
        inputs = torch.zeros(1, 4, 8, 8, device="meta"), 999, torch.zeros(1, 8, 48, device="meta")
        session.new_run()
        assert sd15_pipe.unet(*inputs).sample.device.type == "meta"


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "reached only" in r.getMessage()]


def first_block(_: Any) -> Any:
    return FirstBlockCacheConfig(threshold=1e9)


def pyramid(pipe: Any) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 2000),
        spatial_attention_block_identifiers=["blocks", "transformer_blocks"],
        current_timestep_callback=lambda: 500,
    )


def mag(_: Any) -> Any:
    return MagCacheConfig(
        threshold=10.0, retention_ratio=0.3, num_inference_steps=4, mag_ratios=torch.ones(4)
    )


def taylor(_: Any) -> Any:
    return TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1)


@FLUX
@pytest.mark.parametrize("cache", [first_block, pyramid, mag, taylor])
@pytest.mark.parametrize("variant", ["S", "P", "I"])
def test_caches_reuse_what_the_alignment_made(
    pipe: Any, make_for: Any, draw: Any, caplog: pytest.LogCaptureFixture, cache: Any, variant: Any
) -> None:
    """Layers that ran had weights of their own run; that some did not run is told once a run."""
    made = make_for(pipe, schedule=Schedule("P", (0.9,)))
    transformer: Any = denoiser_of(pipe)
    with hyperalign.attach(pipe, made, variant=variant):
        aligned = draw(pipe, steps=4)
    transformer.enable_cache(cache(pipe))
    base = draw(pipe, steps=4)
    transformer._reset_stateful_cache()
    images: list[torch.Tensor] = []
    for attach_first in (True, False):
        if attach_first:
            transformer.disable_cache()
        with hyperalign.attach(pipe, made, variant=variant) as session:
            if attach_first:
                transformer.enable_cache(cache(pipe))
            caplog.clear()
            images.append(draw(pipe, steps=4))
            assert len(told(caplog)) == 1 and f"of {len(made.network.targets)} layers" in told(caplog)[0]
            assert session.evaluations == 4
            transformer._reset_stateful_cache()
            images.append(draw(pipe, steps=4))
            transformer._reset_stateful_cache()
    assert all(torch.equal(each, images[0]) for each in images[1:])
    assert not torch.equal(images[0], aligned) and not torch.equal(images[0], base)
    assert torch.equal(draw(pipe, steps=4), base)
    with hyperalign.attach(pipe, made, variant=variant):
        transformer.disable_cache()
        assert torch.equal(draw(pipe, steps=4), aligned)


@FLUX
@pytest.mark.parametrize("variant", ["S", "P", "I"])
def test_a_cache_that_skips_nothing_changes_nothing(
    pipe: Any, make_for: Any, draw: Any, caplog: pytest.LogCaptureFixture, variant: Any
) -> None:
    made = make_for(pipe, schedule=Schedule("P", (0.9,)))
    with hyperalign.attach(pipe, made, variant=variant):
        aligned = draw(pipe, steps=4)
        denoiser_of(pipe).enable_cache(FirstBlockCacheConfig(threshold=-1.0))  # pyright: ignore
        assert torch.equal(draw(pipe, steps=4), aligned)
    assert not told(caplog)


@FLUX
def test_weights_are_not_generated_of_blocks_that_a_cache_skipped(
    pipe: Any, make_for: Any, draw: Any
) -> None:
    """P's key time falls into a step that is skipped: what perception would see there is no feature."""
    made = make_for(pipe, schedule=Schedule("P", (0.9,)))
    denoiser_of(pipe).enable_cache(first_block(pipe))  # pyright: ignore
    with hyperalign.attach(pipe, made) as session:
        draw(pipe, steps=4)
        assert (session.evaluations, session.generations) == (4, 1)


@FLUX
@FIRST
def test_a_cache_and_a_perception_pass_of_its_own_are_refused(
    pipe: Any, make_for: Any, draw: Any, attach_first: bool
) -> None:
    made = make_for(pipe, mode="separate")
    transformer: Any = denoiser_of(pipe)
    base = draw(pipe)
    if attach_first:
        with hyperalign.attach(pipe, made):
            transformer.enable_cache(first_block(pipe))
            with pytest.raises(HyperAlignError, match="has a cache .* Call its disable_cache"):
                draw(pipe)
            transformer.disable_cache()
            assert not torch.equal(draw(pipe), base)
    else:
        transformer.enable_cache(first_block(pipe))
        with pytest.raises(HyperAlignError, match="has a cache .* Call its disable_cache"):
            hyperalign.attach(pipe, made)
        transformer.disable_cache()
    assert torch.equal(draw(pipe), base)


def test_a_cache_of_a_u_net_s_attentions(
    sd15_pipe: Any, make_for: Any, draw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_for(sd15_pipe)
    with hyperalign.attach(sd15_pipe, made):
        aligned = draw(sd15_pipe)
        apply_pyramid_attention_broadcast(sd15_pipe.unet, pyramid(sd15_pipe))
        cached = draw(sd15_pipe)
    assert len(told(caplog)) == 1 and not torch.equal(cached, aligned)


@pytest.mark.parametrize("pipe", ["sd3"], indirect=True)
@pytest.mark.parametrize("variant", ["S", "I"])
@FIRST
def test_samples_that_a_cache_leaves_out_take_no_weights_with_them(
    pipe: Any, make_for: Any, draw: Any, variant: Any, attach_first: bool
) -> None:
    """FasterCache runs the guided half of the batch alone at some steps; its samples keep their weights."""
    made = make_for(pipe)
    written: list[torch.Tensor] = []
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: 500,
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
        _unconditional_conditional_input_kwargs_identifiers=[
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "pooled_projections",
        ],
    )
    if not attach_first:
        apply_faster_cache(pipe.transformer, config)
    with hyperalign.attach(pipe, made, variant=variant) as session:
        if attach_first:
            apply_faster_cache(pipe.transformer, config)
        handle = made.network.register_forward_hook(lambda _m, _i, cores: written.append(cores))
        image = draw(pipe, steps=4)
        handle.remove()
    assert torch.isfinite(image).all() and session.evaluations == 4
    assert [len(cores) for cores in written] == ([2] if variant == "I" else [2, 1, 2, 1])
