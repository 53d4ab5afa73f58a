"""hyperalign.attach on diffusers' pipelines, all four classes with random weights."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

import hyperalign
from hyperalign.checkpoint import save
from hyperalign.errors import HyperAlignError
from hyperalign.hosts.diffusers import session
from hyperalign.hosts.diffusers.session import denoiser_of
from hyperalign.schedule import Schedule


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'comfy'}"
    code = f"import sys, hyperalign; hyperalign.attach; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_a_pipeline_is_aligned_and_given_back_bit_for_bit(
    pipe: Any, make_for: Any, draw: Any, mode: str
) -> None:
    base = draw(pipe)
    with hyperalign.attach(pipe, make_for(pipe, mode=mode)) as session:
        aligned = draw(pipe)
        assert (session.evaluations, session.generations) == (3, 3)
    assert (aligned - base).abs().max() > 1e-3
    assert torch.equal(draw(pipe), base)
    assert "forward" not in denoiser_of(pipe).__dict__


def test_a_file_is_enough_and_detach_may_be_called_twice(
    pipe: Any, make_for: Any, draw: Any, tmp_path: Path
) -> None:
    made = make_for(pipe)
    save(tmp_path / "made.safetensors", made.network, made.header, dtype=torch.float32)
    base = draw(pipe)
    with hyperalign.attach(pipe, made):
        expected = draw(pipe)
    session = hyperalign.attach(pipe, str(tmp_path / "made.safetensors"))
    assert torch.equal(draw(pipe), expected)
    session.detach()
    session.detach()
    assert torch.equal(draw(pipe), base)


def test_strength_zero_is_the_base_model_bit_for_bit(pipe: Any, make_for: Any, draw: Any) -> None:
    base = draw(pipe)
    with hyperalign.attach(pipe, make_for(pipe), strength=0.0):
        assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize("variant", ["I", "P"])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_run_writes_its_own_weights(
    pipe: Any, make_for: Any, draw: Any, variant: Any, steps: int
) -> None:
    """Other prompts, batches and guidance one after the other, against a session for each alone."""
    made = make_for(pipe, schedule=Schedule("P", (0.5,)))
    runs: list[dict[str, Any]] = [
        {"prompt": 3},
        {"prompt": 4},
        {"prompt": 4, "seed": 8},
        {"prompt": 4, "seed": 8, "rows": 2},
        {"prompt": 4, "guidance_scale": 1.0},
    ]

    def alone(run: dict[str, Any]) -> torch.Tensor:
        with hyperalign.attach(pipe, made, variant=variant):
            return draw(pipe, steps=steps, **run)

    expected = [alone(run) for run in runs]
    with hyperalign.attach(pipe, made, variant=variant) as session:
        for run, image in zip(runs, expected, strict=True):
            assert torch.equal(draw(pipe, steps=steps, **run), image), run
            assert session.evaluations == steps
            assert session.generations == (2 if variant == "P" and steps > 1 else 1)


def test_an_interrupted_run_leaves_nothing_to_the_next(pipe: Any, make_for: Any, draw: Any) -> None:
    made = make_for(pipe)
    base = draw(pipe)
    with hyperalign.attach(pipe, made, variant="I"):
        expected = draw(pipe)

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    with hyperalign.attach(pipe, made, variant="I"):
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, prompt=5, callback_on_step_end=fail)
        assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), base)


def test_an_error_inside_the_model_leaves_it_clean(pipe: Any, make_for: Any, draw: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    base = draw(pipe)
    *_, last = denoiser_of(pipe).children()
    handle = last.register_forward_hook(fail)
    session = hyperalign.attach(pipe, make_for(pipe))
    with pytest.raises(RuntimeError, match="out of memory"):
        draw(pipe)
    handle.remove()
    aligned = draw(pipe)
    session.detach()
    assert torch.equal(draw(pipe), base) and not torch.equal(aligned, base)


def test_fused_projections_are_refused_until_they_are_apart(pipe: Any, make_for: Any, draw: Any) -> None:
    base: Any = denoiser_of(pipe)
    with hyperalign.attach(pipe, make_for(pipe)):
        expected = draw(pipe)
        base.fuse_qkv_projections()
        with pytest.raises(HyperAlignError, match="are fused; .* Call its unfuse_qkv_projections"):
            draw(pipe)
    for target in (pipe, base):
        with pytest.raises(HyperAlignError, match="are fused; .* Call its unfuse_qkv_projections"):
            hyperalign.attach(target, make_for(pipe))
    assert "forward" not in base.__dict__
    base.unfuse_qkv_projections()
    with hyperalign.attach(pipe, make_for(pipe)):
        assert torch.equal(draw(pipe), expected)


def test_attaching_again_replaces(pipe: Any, make_for: Any, draw: Any) -> None:
    base = draw(pipe)
    with hyperalign.attach(pipe, make_for(pipe, seed=5)):
        expected = draw(pipe)
    first = hyperalign.attach(pipe, make_for(pipe, seed=4))
    second = hyperalign.attach(pipe, make_for(pipe, seed=5))
    first.detach()
    assert torch.equal(draw(pipe), expected)
    second.detach()
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_hypernetwork_in_float32(
    pipe: Any, make_for: Any, draw: Any, dtype: torch.dtype
) -> None:
    pipe.to(dtype)
    made = make_for(pipe)
    seen: list[torch.dtype] = []
    handle = made.network.register_forward_hook(lambda _m, _i, cores: seen.append(cores.dtype))
    base = draw(pipe)
    with hyperalign.attach(pipe, made, variant="I"):
        aligned = draw(pipe)
    handle.remove()
    assert seen == [torch.float32]
    assert {p.dtype for p in made.network.parameters()} == {torch.float32}
    assert aligned.dtype == base.dtype == dtype
    assert torch.isfinite(aligned).all() and not torch.equal(aligned, base)


@pytest.mark.parametrize("attach_first", [True, False])
def test_model_offload_keeps_the_alignment_run_after_run(
    pipe: Any, make_for: Any, draw: Any, attach_first: bool
) -> None:
    """A pipeline takes its offload hooks off and puts them on again at the end of every run."""
    made = make_for(pipe)
    base = draw(pipe)
    with hyperalign.attach(pipe, made):
        expected = draw(pipe)
    if attach_first:
        session = hyperalign.attach(pipe, made)
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        pipe.enable_model_cpu_offload(device="cpu")
        session = hyperalign.attach(pipe, made)
    for _ in range(3):
        assert torch.equal(draw(pipe), expected)
    session.detach()
    assert torch.equal(draw(pipe), base)
    pipe.remove_all_hooks()
    assert torch.equal(draw(pipe), base)


def test_the_hypernetwork_follows_its_inputs(sd15_pipe: Any, make_for: Any) -> None:
    """The meta device stands for an accelerator: shapes and devices are real, values are not."""
    made = make_for(sd15_pipe)
    unet = sd15_pipe.unet.to("meta")
    inputs = torch.zeros(1, 4, 8, 8, device="meta"), 999, torch.zeros(1, 8, 48, device="meta")
    with hyperalign.attach(unet, made):
        assert unet(*inputs).sample.device.type == "meta"
    assert {p.device.type for p in made.network.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_another_scheduler_may_take_over(sd15_pipe: Any, make_for: Any, draw: Any, kind: Any) -> None:
    """Heun evaluates twice at the same time; with I, weights are still written once a run."""
    with hyperalign.attach(sd15_pipe, make_for(sd15_pipe), variant="I") as session:
        draw(sd15_pipe)
        sd15_pipe.scheduler = kind.from_config(sd15_pipe.scheduler.config)
        first, second = draw(sd15_pipe), draw(sd15_pipe, prompt=4)
        assert session.generations == 1
        assert torch.equal(draw(sd15_pipe), first) and not torch.equal(first, second)


@pytest.mark.parametrize("pipe", ["flux"], indirect=True)
def test_both_calls_of_true_guidance_have_weights_of_their_own(pipe: Any, make_for: Any, draw: Any) -> None:
    made = make_for(pipe)
    written: list[torch.Tensor] = []
    handle = made.network.register_forward_hook(lambda _m, _i, cores: written.append(cores))
    negative = {
        "negative_prompt_embeds": torch.randn(1, 8, 48),
        "negative_pooled_prompt_embeds": torch.randn(1, 16),
    }
    with hyperalign.attach(pipe, made, variant="I") as session:
        draw(pipe, true_cfg_scale=4.0, **negative)
    handle.remove()
    assert (session.evaluations, session.generations, len(written)) == (3, 1, 2)
    assert (written[0] - written[1]).abs().max() > 1e-3


@pytest.mark.parametrize("pipe", ["sdxl"], indirect=True)
def test_whoever_samples_sdxl_with_zeros_for_the_empty_prompt_is_told_once_a_run(
    pipe: Any, make_for: Any, draw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    zeros = {"negative_prompt_embeds": torch.zeros(1, 8, 48)}
    with hyperalign.attach(pipe, make_for(pipe)):
        draw(pipe)
        assert "zeros" not in caplog.text
        draw(pipe, **zeros)
    (told,) = [record.message for record in caplog.records]
    assert 'Pass negative_prompt="" to encode it' in told


def test_what_has_no_denoiser_is_refused(sd15_pipe: Any, make_for: Any) -> None:
    made = make_for(sd15_pipe)
    sd15_pipe.unet = None
    for target, name in ((sd15_pipe, "StableDiffusionPipeline"), ("sd15", "str")):
        with pytest.raises(HyperAlignError, match=f"given a {name} without transformer or unet; expected"):
            hyperalign.attach(target, made)


@pytest.mark.parametrize("mode", ["prefix", "separate"])
@pytest.mark.parametrize("part", ["down_blocks.1", "mid_block"])
def test_compiled_parts_see_the_weights(
    sd15_pipe: Any, make_for: Any, draw: Any, mode: str, part: str
) -> None:
    """One part holds layers that are looked at, the other layers that are adapted; graphs come first."""
    made = make_for(sd15_pipe, mode=mode)
    base = draw(sd15_pipe)
    with hyperalign.attach(sd15_pipe, made):
        expected = draw(sd15_pipe)
    sd15_pipe.unet.get_submodule(part).compile(backend="eager")
    draw(sd15_pipe)
    with hyperalign.attach(sd15_pipe, made):
        torch.testing.assert_close(draw(sd15_pipe), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(draw(sd15_pipe), base, atol=1e-4, rtol=1e-4)


def test_the_package_s_attach_takes_what_the_session_s_does(monkeypatch: pytest.MonkeyPatch) -> None:
    public, own = (signature(each).parameters for each in (hyperalign.attach, session.attach))
    assert list(public)[1:] == list(own)[1:]
    assert [each.default for each in public.values()] == [each.default for each in own.values()]
    given = list[object]()
    monkeypatch.setattr(session, "attach", lambda *arguments: given.append(arguments))
    hyperalign.attach("pipe", "file", 0.5, "P", merging="merged", capture=True)
    assert given == [("pipe", "file", 0.5, "P", "merged", True)]
