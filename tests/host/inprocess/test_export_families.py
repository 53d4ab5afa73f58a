"""The same LoRA file in both hosts, for every family at reduced width: the live hypernetwork's weights."""

from __future__ import annotations

import pytest
import torch
from small_families import (
    SIDE,
    SIGMAS,
    SMALL_SD15,
    SMALL_SDXL,
    conditioning,
    euler_in_comfyui,
    euler_in_diffusers,
    unet_models,
)


def one_lora_file(folder, monkeypatch, model, hyperalign, positive, shape):
    """The file that the host's export writes, and the MODEL with it as Load LoRA would make it."""
    import comfy.sd
    import comfy.utils
    import folder_paths

    from hyperalign.hosts.comfy.export import export_lora

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(folder))
    with torch.inference_mode():
        path = export_lora(
            model, hyperalign, positive, {"samples": torch.ones(shape)}, seed=5, time=1.0, strength=1.0,
            filename_prefix="lora", dtype=torch.float32,
        )  # fmt: skip
    return path, comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), 1.0, 0.0)[
        0
    ]


def in_diffusers_with(pipeline, path, model, prefix, draw):
    """What a diffusers model draws with a LoRA file read by its pipeline."""
    pytest.importorskip("peft")
    read = pipeline.lora_state_dict(str(path.parent), weight_name=path.name)
    state, alphas = read if isinstance(read, tuple) else (read, None)
    model.load_lora_adapter(state, network_alphas=alphas, prefix=prefix)
    try:
        with torch.no_grad():
            return draw()
    finally:
        model.unload_lora()


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_one_lora_file_is_the_live_hypernetwork_in_both_hosts(
    family, make_hyperalign, tmp_path, monkeypatch, caplog, mode
):
    import diffusers

    from hyperalign.hosts.comfy.model import apply

    spec, ours, theirs, call, velocity = family
    hyperalign = make_hyperalign(spec=spec, mode=mode, perception_blocks=2)
    context, pooled, positive = conditioning(spec)
    noise = torch.randn(1, 4, SIDE, SIDE, generator=torch.manual_seed(5))
    base = euler_in_comfyui(theirs, noise, positive, SIGMAS)
    live = euler_in_comfyui(apply(theirs, hyperalign, variant="I"), noise, positive, SIGMAS)
    path, patched = one_lora_file(tmp_path, monkeypatch, theirs, hyperalign, positive, noise.shape)
    assert not [m for m in caplog.messages if "not loaded" in m.lower()]
    torch.testing.assert_close(euler_in_comfyui(patched, noise, positive, SIGMAS), live, atol=1e-4, rtol=0)
    assert (live - base).abs().max() > 1e-2

    pipeline = {"flux": diffusers.FluxPipeline, "sd3": diffusers.StableDiffusion3Pipeline}[spec.family]
    drawn = in_diffusers_with(
        pipeline, path, ours, "transformer",
        lambda: euler_in_diffusers(ours, noise, call, velocity, context, pooled),
    )  # fmt: skip
    torch.testing.assert_close(theirs.model.process_latent_in(live), drawn, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spec", [SMALL_SD15, SMALL_SDXL], ids=lambda spec: spec.family)
def test_one_lora_file_fits_unets_in_both_hosts(comfy, make_hyperalign, tmp_path, monkeypatch, caplog, spec):
    import diffusers

    from hyperalign.hosts.comfy.model import apply

    torch.manual_seed(6)
    with torch.no_grad():
        ours, theirs = unet_models(spec)
    ours = ours.eval().requires_grad_(False)
    hyperalign = make_hyperalign(spec=spec, mode="separate")
    context, pooled = torch.randn(1, 7, spec.cross_attention_dim), torch.randn(1, 1280)
    sizes = {"height": 64, "width": 64, "crop_h": 0, "crop_w": 0, "target_height": 64, "target_width": 64}
    positive = [[context, {"pooled_output": pooled, **sizes}]]
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(5))
    start = float(theirs.model.model_sampling.sigma_max)
    base = euler_in_comfyui(theirs, noise, positive, [start, 0.0])
    live = euler_in_comfyui(apply(theirs, hyperalign), noise, positive, [start, 0.0])
    path, patched = one_lora_file(tmp_path, monkeypatch, theirs, hyperalign, positive, noise.shape)
    assert not [m for m in caplog.messages if "not loaded" in m.lower()]
    with_lora = euler_in_comfyui(patched, noise, positive, [start, 0.0])
    # One step from pure noise multiplies the prediction by sigma; compare predictions. Merging rounds weights
    # of another size than the hooks do, and through a whole network that differs by processor: 1.7e-4 with
    # AVX2, less with AVX-512. The LoRA itself changes predictions by far more.
    torch.testing.assert_close(with_lora / start, live / start, atol=5e-4, rtol=1e-4)
    assert ((live - base) / start).abs().max() > 1e-2

    kinds = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
    extra = {"text_embeds": pooled, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]])}
    eps = in_diffusers_with(
        kinds[spec.family],
        path,
        ours,
        "unet",
        lambda: ours(noise, 999, context, added_cond_kwargs=extra).sample,
    )
    scaled = theirs.model.process_latent_in(live) / start
    torch.testing.assert_close(noise * (1 + start**2) ** 0.5 / start - eps, scaled, atol=1e-4, rtol=1e-4)
