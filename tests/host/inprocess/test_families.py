"""Every family in both hosts: the same layers by name, the same weights generated, the same prediction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compiling import compiled, with_traceable_attention
from recorded_cores import assert_same_cores, recorded_cores
from small_families import (
    FAMILIES,
    FLUX,
    SD3,
    SIDE,
    SIGMAS,
    SMALL_SD15,
    SMALL_SDXL,
    STEPS,
    conditioning,
    euler_in_comfyui,
    euler_in_diffusers,
    host_model,
    host_unet_config,
    unet_models,
)
from torch import nn

from hyperalign.errors import HyperAlignError
from hyperalign.families.flux import FLUX_DEV, FluxSpec
from hyperalign.families.sd3 import SD35_MEDIUM, SD3Spec
from hyperalign.families.unet import SD15, SDXL
from hyperalign.targets import Place
from train.noise import DiffusionSchedule


def host_place(entry) -> Place:
    """The host's own map: a key, or a key with (dimension, start, length)."""
    key, rows = (entry, None) if isinstance(entry, str) else (entry[0], entry[1])
    return Place(key.removesuffix(".weight"), None if rows is None else rows[1])


@pytest.mark.parametrize("spec", [FLUX_DEV, FLUX, SD35_MEDIUM, SD3, SD15, SDXL], ids=repr)
def test_every_target_lies_where_the_host_says(comfy, spec):
    import comfy.utils as utils

    if isinstance(spec, FluxSpec):
        names = utils.flux_to_diffusers(
            {
                "depth": spec.double_blocks,
                "depth_single_blocks": spec.single_blocks,
                "hidden_size": spec.hidden,
            }
        )
    elif isinstance(spec, SD3Spec):
        names = utils.mmdit_to_diffusers({"depth": spec.hidden // 64, "num_blocks": spec.blocks})
    else:
        names = utils.unet_to_diffusers(host_unet_config(spec))
    for target in spec.targets("separate"):
        assert spec.place(target.name) == host_place(names[f"{target.name}.weight"]), target.name


@pytest.fixture(scope="module")
def schnell(comfy):
    """The reduced FLUX.1 without an input for the guidance, in both hosts."""
    import comfy.supported_models as kinds
    import comfy.utils as utils
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(8)
    spec, build, flux_call, velocity = FAMILIES["flux"]
    with torch.no_grad():
        dev, dev_of_comfyui = build()
        ours = FluxTransformer2DModel.from_config({**dev.config, "guidance_embeds": False})
        config = {**dev_of_comfyui.model.model_config.unet_config, "guidance_embed": False}
        theirs = host_model(kinds.FluxSchnell, config, ours, utils.flux_to_diffusers(config))

    def call(*inputs):
        return {name: value for name, value in flux_call(*inputs).items() if name != "guidance"}

    return replace(spec, guidance=False), ours.eval().requires_grad_(False), theirs, call, velocity


@pytest.mark.parametrize("variant", ["S", "I"])
@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_both_hosts_write_the_same_weights_and_draw_the_same(family, make_hyperalign, mode, variant):
    both_hosts_agree(family, make_hyperalign, mode, variant)


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_both_hosts_agree_on_flux_schnell(schnell, make_hyperalign, mode):
    both_hosts_agree(schnell, make_hyperalign, mode, "S")


def test_a_hypernetwork_of_flux_dev_is_refused_on_schnell_in_both_hosts(schnell, make_hyperalign):
    from hyperalign.hosts.comfy.model import apply
    from hyperalign.hosts.diffusers.session import attach

    _, ours, theirs, _, _ = schnell
    of_dev = make_hyperalign(spec=FLUX, perception_blocks=2)
    for use in (lambda: apply(theirs, of_dev), lambda: attach(ours, of_dev.hyperalign)):
        with pytest.raises(HyperAlignError, match="guidance"):
            use()


def both_hosts_agree(family, make_hyperalign, mode, variant):
    from hyperalign.hosts.comfy.model import apply
    from hyperalign.hosts.diffusers.adapter import spec_of
    from hyperalign.hosts.diffusers.session import attach

    spec, ours, theirs, call, velocity = family
    assert spec_of(ours) == spec
    hyperalign = make_hyperalign(spec=spec, mode=mode, variant=variant, perception_blocks=2)
    context, pooled, positive = conditioning(spec)
    noise = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(11))
    with recorded_cores(hyperalign) as from_comfyui:
        in_comfyui = euler_in_comfyui(apply(theirs, hyperalign), noise, positive, SIGMAS)
    with recorded_cores(hyperalign) as from_diffusers, torch.no_grad(), attach(ours, hyperalign.hyperalign):
        in_diffusers = euler_in_diffusers(ours, noise, call, velocity, context, pooled)

    assert_same_cores(from_comfyui, from_diffusers, {"S": 3, "I": 1}[variant])
    scaled = theirs.model.process_latent_in(in_comfyui)
    torch.testing.assert_close(scaled, in_diffusers, atol=1e-4, rtol=0)
    with torch.no_grad():
        plain = euler_in_diffusers(ours, noise, call, velocity, context, pooled)
    assert (plain - in_diffusers).abs().max() > 1e-2


def test_a_fused_slice_gets_the_delta_of_its_own_rows(family, make_hyperalign):
    """Against a copy of W to which the whole low-rank product was added, row by row."""
    from hyperalign.delta import merged_delta
    from hyperalign.hosts.layers import AdaptedLayers

    spec, _, theirs, _, _ = family
    network = make_hyperalign(spec=spec, mode="separate").hyperalign.network
    base = theirs.model.diffusion_model
    places = [spec.place(target.name) for target in network.targets]
    fused = [(i, place) for i, place in enumerate(places) if place.first_row is not None]
    cores = torch.randn(1, len(places), 16, 16, generator=torch.Generator().manual_seed(4))
    path = fused[-1][1].path
    layer = base.get_submodule(path)
    weight = layer.weight.clone()
    for index, place in fused:
        if place.path == path:
            a_aux, b_aux = network.aux(index)
            weight[place.first_row : place.first_row + spec.hidden] += merged_delta(
                a_aux, b_aux, cores[0, index]
            )
    x = torch.randn(1, 7, spec.hidden, generator=torch.Generator().manual_seed(5))
    layers = AdaptedLayers(network, places)
    modules = [base.get_submodule(path) for path in layers.paths]
    with torch.no_grad(), layers.installed(modules):
        layers.give(layers.fold(cores, 1.0, torch.float32))
        hooked = layer(x)
    expected = torch.nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(hooked, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["prefix", "separate"])
@pytest.mark.parametrize(
    ("spec", "prediction"),
    [(SMALL_SD15, "epsilon"), (SMALL_SDXL, "epsilon"), (SMALL_SDXL, "v_prediction")],
    ids=["sd15", "sdxl", "sdxl-v"],
)
def test_unets_agree_too(comfy, make_hyperalign, spec, prediction, mode):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    from hyperalign.hosts.comfy.model import apply
    from hyperalign.hosts.diffusers.adapter import spec_of
    from hyperalign.hosts.diffusers.session import attach

    torch.manual_seed(6)
    with torch.no_grad():
        ours, theirs = unet_models(spec)
    ours = ours.eval().requires_grad_(False)
    assert spec_of(ours) == spec
    hyperalign = make_hyperalign(spec=spec, mode=mode)
    context, pooled = torch.randn(1, 7, spec.cross_attention_dim), torch.randn(1, 1280)
    extra = {"text_embeds": pooled.expand(2, -1), "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)}
    sizes = {"height": 64, "width": 64, "crop_h": 0, "crop_w": 0, "target_height": 64, "target_width": 64}
    positive = [[context, {"pooled_output": pooled, **sizes}]]
    noise = torch.randn(2, 4, 8, 8)
    table = 1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    table = table.cumprod(0).float()
    sigmas = [float(((1 - table[t]) / table[t]).sqrt()) for t in STEPS]
    if prediction == "v_prediction":
        theirs = ModelSamplingDiscrete().patch(theirs, prediction, False)[0]
    with recorded_cores(hyperalign) as from_comfyui:
        in_comfyui = euler_in_comfyui(apply(theirs, hyperalign), noise, positive, [*sigmas, 0.0])

    x, process = noise, DiffusionSchedule(prediction)
    with recorded_cores(hyperalign) as from_diffusers, torch.no_grad(), attach(ours, hyperalign.hyperalign):
        for t, following in zip(STEPS, [*STEPS[1:], None], strict=True):
            output = ours(x, t, context.expand(2, -1, -1), added_cond_kwargs=extra).sample
            x0, eps = process.predictions(x, output, torch.tensor([t, t]))
            x = x0 if following is None else process.add_noise(x0, eps, torch.tensor([following] * 2))
    assert_same_cores(from_comfyui, from_diffusers, len(STEPS))
    scaled = theirs.model.process_latent_in(in_comfyui)
    torch.testing.assert_close(scaled / x.std(), x / x.std(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["prefix", "separate"])
def test_compiled_transformers_give_the_same_and_are_left_as_they_were(family, make_hyperalign, mode):
    from hyperalign.hosts.comfy.model import apply

    spec, _, theirs, _, _ = family
    hyperalign = make_hyperalign(spec=spec, mode=mode, perception_blocks=2)
    _, _, positive = conditioning(spec)
    noise = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(12))
    before = euler_in_comfyui(theirs, noise, positive, SIGMAS)
    aligned = apply(with_traceable_attention(theirs), hyperalign)
    expected = euler_in_comfyui(aligned, noise, positive, SIGMAS)
    found = euler_in_comfyui(compiled(aligned), noise, positive, SIGMAS)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (expected - before).abs().max() > 1e-2
    assert torch.equal(euler_in_comfyui(theirs, noise, positive, SIGMAS), before)
    weak = apply(theirs, hyperalign, strength=0.0)
    assert torch.equal(euler_in_comfyui(weak, noise, positive, SIGMAS), before)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_a_reference_image_does_not_enter_perception(family, make_hyperalign):
    """FLUX Kontext appends its reference's tokens to the image's own."""
    from hyperalign.hosts.comfy.model import apply

    spec, _, theirs, _, _ = family
    hyperalign = make_hyperalign(spec=spec, perception_blocks=2)
    shapes: list[torch.Size] = []
    network: nn.Module = hyperalign.hyperalign.network
    handle = network.register_forward_pre_hook(
        lambda _m, inputs: shapes.append(tuple(inputs[0].features[0].shape))
    )
    _, _, positive = conditioning(spec)
    positive[0][1]["reference_latents"] = [torch.randn(1, 4, 8, 8)]
    noise = torch.randn(1, 4, SIDE, SIDE)
    assert torch.isfinite(euler_in_comfyui(apply(theirs, hyperalign), noise, positive, SIGMAS)).all()
    handle.remove()
    assert set(shapes) == {(1, spec.hidden, SIDE // 2, SIDE // 2)}


def test_a_transformers_patches_are_left_as_they_are(comfy, family, make_hyperalign):
    """Hosts of 2026 call an attention's patches with names, and read what they change from a dict."""
    from hyperalign.hosts.comfy.model import apply

    spec, _, theirs, _, _ = family
    blocks = theirs.model.diffusion_model.get_submodule("double_blocks" if spec is FLUX else "joint_blocks")
    seen, forward = [], type(blocks[0]).forward

    def record(block, *args, **kwargs):
        seen.extend(kwargs["transformer_options"]["patches"]["attn1_patch"])
        return forward(block, *args, **kwargs)

    def patch(q, k, v, **named):
        return {"q": q}

    model = apply(theirs, make_hyperalign(spec=spec, perception_blocks=2))
    model.set_model_attn1_patch(patch)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(blocks[0]), "forward", record)
        euler_in_comfyui(model, torch.randn(1, 4, SIDE, SIDE), conditioning(spec)[2], SIGMAS)
    assert set(seen) == {patch}
