"""A row's weights as a plain LoRA: exactly the hypernetwork's change, under names that loaders read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import hyperalign
from hyperalign.checkpoint import save
from hyperalign.cli.main import main
from hyperalign.delta import core_matrix, merged_delta
from hyperalign.errors import HyperAlignError
from hyperalign.export import ORIGIN_KEY, lora_tensors
from hyperalign.families.flux import FLUX_DEV
from hyperalign.families.sd3 import SD35_MEDIUM
from hyperalign.families.unet import SD15, SDXL, TINY
from hyperalign.hosts.diffusers.export import encode, export_lora
from hyperalign.hosts.diffusers.session import denoiser_of
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.perception import Perceived
from hyperalign.targets import LoraNames, Target

SIZES = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(rank=SIZES, a=SIZES, b=SIZES, inside=SIZES, outside=SIZES, strength=st.floats(-3, 3))
def test_the_file_holds_the_change_itself(
    rank: int, a: int, b: int, inside: int, outside: int, strength: float
) -> None:
    network = HyperNetwork(
        HyperNetworkConfig(rank=rank, a=a, b=b, conditioning="none"),
        [Target("x.to_q", inside, outside)],
        [4],
        2,
    ).requires_grad_(False)
    torch.nn.init.normal_(network.b_aux[0])
    factors = network.factors(Perceived([], torch.zeros(1, 2)))
    tensors = lora_tensors(network, LoraNames("lora_unet_"), factors, strength, torch.float32)

    down, up = tensors["lora_unet_x_to_q.lora_down.weight"], tensors["lora_unet_x_to_q.lora_up.weight"]
    scale = tensors["lora_unet_x_to_q.alpha"] / down.shape[0]
    expected = strength * merged_delta(*network.aux(0), core_matrix(*factors)[0, 0])
    assert down.shape == (rank, inside) and up.shape == (outside, rank)
    torch.testing.assert_close(scale * up @ down, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "first"),
    [
        (TINY, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"),
        (SD15, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"),
        (SDXL, "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"),
        (FLUX_DEV, "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight"),
        (SD35_MEDIUM, "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
    ],
    ids=["tiny", "sd15", "sdxl", "flux", "sd3"],
)
def test_every_layer_of_a_family_has_keys_of_its_own(spec: Any, first: str) -> None:
    keys = [spec.lora_names.keys(target.name) for target in spec.targets("separate")]
    named = [key for triple in keys for key in triple if key is not None]
    assert keys[0][0] == first
    assert len(set(named)) == len(named)


def test_more_than_one_row_and_an_overflow_are_refused() -> None:
    network = HyperNetwork(HyperNetworkConfig(conditioning="none"), [Target("x", 4, 4)], [4], 2)
    torch.nn.init.normal_(network.b_aux[0], std=1e6)
    with pytest.raises(HyperAlignError, match="weights of 2 samples; a LoRA file holds those of one"):
        lora_tensors(network, LoraNames(""), network.factors(Perceived([], torch.zeros(2, 2))))
    with pytest.raises(HyperAlignError, match=r"not finite in torch.float16. Lower the strength"):
        lora_tensors(network, LoraNames(""), network.factors(Perceived([], torch.zeros(1, 2))))


def use_lora(pipe: Any, path: Path) -> None:
    pytest.importorskip("peft")
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)


def alone(pipe: Any) -> dict[str, Any]:
    """Options for one row: FLUX's guidance is an input, and stays."""
    return {} if "transformer" in pipe.components and denoiser_of(pipe).config.get("guidance_embeds") else {
        "guidance_scale": 1.0
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_a_whole_run_with_the_lora_is_a_whole_run_of_variant_i(
    pipe: Any, make_for: Any, draw: Any, prompt_of: Any, tmp_path: Path, mode: str
) -> None:
    """I generates its weights once, from pure noise: those of time 1. Through diffusers' own loader."""
    made = make_for(pipe, mode=mode)
    base = draw(pipe, **alone(pipe))
    with hyperalign.attach(pipe, made, strength=0.8, variant="I"):
        live = draw(pipe, **alone(pipe))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        path = tmp_path / f"{dtype}.safetensors"
        export_lora(pipe, made, path, seed=7, strength=0.8, dtype=dtype, **prompt_of(pipe))
        assert torch.equal(draw(pipe, **alone(pipe)), base)
        use_lora(pipe, path)
        with_lora = draw(pipe, **alone(pipe))
        pipe.unload_lora_weights()
        assert (with_lora - live).abs().max() < tolerance * (live - base).abs().max()
    assert (live - base).abs().max() > 1e-2


@pytest.mark.parametrize("time", [0.999, 0.4])
def test_below_time_one_samples_are_noised(
    pipe: Any, make_for: Any, draw: Any, prompt_of: Any, tmp_path: Path, time: float
) -> None:
    """The model's own prediction at that time, live and with the LoRA."""
    made, base = make_for(pipe), denoiser_of(pipe)
    samples = draw(pipe)
    path = export_lora(
        pipe, made, tmp_path / "lora.safetensors", seed=7, time=time, samples=samples, dtype=torch.float32,
        **prompt_of(pipe),
    )  # fmt: skip
    calls: list[dict[str, Any]] = []

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(dict(zip(("sample", "timestep"), args, strict=False)) | kwargs)

    handle = base.register_forward_pre_hook(look, with_kwargs=True)
    draw(pipe, **alone(pipe))
    handle.remove()
    call = calls[0]
    if "sample" in call:  # x_T is the noise itself
        t = round(time * 999)
        alpha = DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod[t]
        call |= {"sample": alpha.sqrt() * samples + (1 - alpha).sqrt() * call["sample"], "timestep": t}
    else:
        noise, last = call["hidden_states"], float(call["timestep"][0])
        call |= {
            "hidden_states": (1 - time) * samples + time * noise,
            "timestep": torch.full_like(call["timestep"], time * last),
        }
    plain = base(**call)[0]
    with torch.no_grad(), hyperalign.attach(pipe, made):
        live = base(**call)[0]
    use_lora(pipe, path)
    with_lora = base(**call)[0]
    torch.testing.assert_close(with_lora, live, atol=1e-4, rtol=0)
    assert (live - plain).abs().max() > 1e-3


def test_the_header_says_what_the_file_was_made_from(sd15_pipe: Any, make_for: Any, tmp_path: Path) -> None:
    made = make_for(sd15_pipe)
    save(tmp_path / "mine.safetensors", made.network, made.header)
    out = tmp_path / "deep" / "lora.safetensors"
    export_lora(sd15_pipe, tmp_path / "mine.safetensors", out, prompt="a cat", seed=3, strength=0.5)
    with safe_open(str(out), framework="pt") as file:
        assert json.loads(file.metadata()[ORIGIN_KEY]) == {
            "hypernetwork": "mine.safetensors", "prompt": "a cat", "seed": 3, "time": 1.0, "strength": 0.5
        }  # fmt: skip


def test_a_static_hypernetwork_is_exported_too(sd15_pipe: Any, make_for: Any, tmp_path: Path) -> None:
    made = make_for(sd15_pipe, conditioning="none")
    first, second = (
        load_file(export_lora(sd15_pipe, made, tmp_path / "one.safetensors", prompt=prompt))
        for prompt in ("a", "b")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_exporting_leaves_the_pipeline_as_it_was(
    pipe: Any, make_for: Any, draw: Any, prompt_of: Any, tmp_path: Path
) -> None:
    base, scheduler = draw(pipe), pipe.scheduler
    pipe.enable_model_cpu_offload(device="cpu")
    export_lora(pipe, make_for(pipe), tmp_path / "lora.safetensors", **prompt_of(pipe))
    assert pipe.scheduler is scheduler
    assert torch.equal(draw(pipe), base)


def test_bad_requests_are_refused(sd15_pipe: Any, make_for: Any, tmp_path: Path) -> None:
    made, out = make_for(sd15_pipe), tmp_path / "lora.safetensors"
    for time in (-0.1, 1.5, float("nan")):
        with pytest.raises(HyperAlignError, match=f"time is {time}; expected a number from 0"):
            export_lora(sd15_pipe, made, out, prompt="a", time=time)
    with pytest.raises(HyperAlignError, match="time is 0.5, but there is no image to put noise on"):
        export_lora(sd15_pipe, made, out, prompt="a", time=0.5)
    with pytest.raises(HyperAlignError, match="strength is inf; expected a number"):
        export_lora(sd15_pipe, made, out, prompt="a", strength=float("inf"))
    with pytest.raises(HyperAlignError, match="weights of 2 samples"):
        export_lora(sd15_pipe, made, out, prompt="a", num_images_per_prompt=2)
    with (
        hyperalign.attach(sd15_pipe, made),
        pytest.raises(HyperAlignError, match="has HyperAlign attached.*Detach it first"),
    ):
        export_lora(sd15_pipe, made, out, prompt="a")
    assert list(tmp_path.glob("*.safetensors")) == []


def test_the_command_writes_what_the_function_writes(
    sd15_pipe: Any, make_for: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_for(sd15_pipe)
    save(tmp_path / "mine.safetensors", made.network, made.header, dtype=torch.float32)
    sd15_pipe.save_pretrained(tmp_path / "base")
    Image.effect_noise((40, 33), 90).convert("RGB").save(tmp_path / "image.png")
    out = tmp_path / "lora.safetensors"
    given = ["--pipeline", str(tmp_path / "base"), "--hypernetwork", str(tmp_path / "mine.safetensors")]
    given += ["--prompt", "a cat", "--seed", "5", "--out", str(out), "--dtype", "float32"]
    assert main(["export", *given, "--time", "0.6", "--image", str(tmp_path / "image.png")]) == 0
    assert str(out) in capsys.readouterr().out

    samples = encode(sd15_pipe, Image.open(tmp_path / "image.png"), height=32, width=32)
    assert samples.shape == (1, 4, 4, 4)
    other = export_lora(
        sd15_pipe, made, tmp_path / "other.safetensors", prompt="a cat", seed=5, time=0.6, samples=samples,
        dtype=torch.float32, height=32, width=32,
    )  # fmt: skip
    expected = load_file(other)
    assert all(torch.allclose(value, expected[key], atol=1e-5) for key, value in load_file(out).items())

    assert main(["export", *given, "--time", "0.6"]) == 2
    assert "error: time is 0.6, but there is no image" in capsys.readouterr().err
    given[1] = str(tmp_path)
    assert main(["export", *given]) == 2
    assert "no folder of a diffusers pipeline" in capsys.readouterr().err
