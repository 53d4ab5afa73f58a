"""Reduced-width models of every family with the same random weights in both hosts, and how they sample.

A plain module beside the tests: conftest.py puts this folder on the path.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from hyperalign.families.flux import FluxSpec
from hyperalign.families.sd3 import SD3Spec
from hyperalign.families.unet import UNetSpec

FLUX = FluxSpec(hidden=64, double_blocks=4, single_blocks=2, latent_channels=4, context_dim=48)
SD3 = SD3Spec(hidden=256, blocks=4, dual_blocks=3, latent_channels=4, context_dim=48)
SMALL_SD15 = UNetSpec("sd15", 4, (32, 64, 64, 64), 2, 768, (1, 1, 1, 0))
SMALL_SDXL = UNetSpec("sdxl", 4, (32, 64, 64), 2, 2048, (0, 1, 2))
SHALLOW_SD15 = UNetSpec("sd15", 4, (32, 64), 1, 768, (1, 0))
SHALLOW_SDXL = UNetSpec("sdxl", 4, (32, 64), 1, 2048, (0, 1))
MIDDLE_SD15 = UNetSpec("sd15", 4, (32, 64), 1, 768, (0, 0))
"""Where torch.compile traces a whole U-Net: it takes seconds for each layer."""
POOLED = 24
SIDE = 6
TOKENS = 5
STEPS = [999, 700, 300]
SIGMAS = [1.0, 0.8, 0.45, 0.0]


def host_unet_config(spec):
    per_level = [spec.layers_per_block] * len(spec.block_out_channels)
    depths = [depth for depth, n in zip(spec.transformer_layers, per_level, strict=True) for _ in range(n)]
    outputs = [d for d in spec.transformer_layers for _ in range(spec.layers_per_block + 1)]
    first = spec.block_out_channels[0]
    return {
        "num_res_blocks": per_level,
        "channel_mult": [channels // first for channels in spec.block_out_channels],
        "transformer_depth": depths,
        "transformer_depth_output": outputs,
        "transformer_depth_middle": spec.transformer_layers[-1] or 1,
        "in_channels": 4, "out_channels": 4, "model_channels": first, "context_dim": spec.cross_attention_dim,
    }  # fmt: skip


def flux_models():
    import comfy.supported_models as kinds
    import comfy.utils as utils
    from comfy.ldm.flux.model import FluxParams
    from diffusers import FluxTransformer2DModel

    ours = FluxTransformer2DModel(
        in_channels=16, num_layers=FLUX.double_blocks, num_single_layers=FLUX.single_blocks,
        attention_head_dim=32, num_attention_heads=2, joint_attention_dim=FLUX.context_dim,
        pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    config = {
        "image_model": "flux", "in_channels": 4, "out_channels": 4, "vec_in_dim": POOLED,
        "context_in_dim": FLUX.context_dim, "hidden_size": FLUX.hidden, "mlp_ratio": 4.0, "num_heads": 2,
        "depth": FLUX.double_blocks, "depth_single_blocks": FLUX.single_blocks, "axes_dim": [8, 12, 12],
        "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    }  # fmt: skip
    if "txt_ids_dims" in {field.name for field in dataclasses.fields(FluxParams)}:
        config["txt_ids_dims"] = []  # later hosts ask for it
    return ours, host_model(kinds.Flux, config, ours, utils.flux_to_diffusers(config))


def sd3_models():
    import comfy.supported_models as kinds
    import comfy.utils as utils
    from diffusers import SD3Transformer2DModel

    ours = SD3Transformer2DModel(
        sample_size=SIDE, in_channels=4, out_channels=4, num_layers=SD3.blocks, attention_head_dim=64,
        num_attention_heads=4, joint_attention_dim=SD3.context_dim, caption_projection_dim=SD3.hidden,
        pooled_projection_dim=POOLED, pos_embed_max_size=8, dual_attention_layers=(0, 1, 2),
        qk_norm="rms_norm",
    )  # fmt: skip
    config = {
        "in_channels": 4, "patch_size": 2, "depth": SD3.blocks, "input_size": None,
        "adm_in_channels": POOLED, "pos_embed_max_size": 8, "num_patches": 64,
        "pos_embed_scaling_factor": None, "qk_norm": "rms", "x_block_self_attn_layers": [0, 1, 2],
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": SD3.context_dim, "out_features": SD3.hidden},
        },
    }  # fmt: skip
    return ours, host_model(kinds.SD3, config, ours, utils.mmdit_to_diffusers(config))


def host_model(kind, config, ours, names):
    """The host's own class around the same random weights."""
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher

    settings = kind(dict(config))
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({})
    wanted = model.diffusion_model.state_dict()
    for name, value in ours.state_dict().items():
        entry = names[name]
        key, rows, change = (*((entry, None, None) if isinstance(entry, str) else entry), None)[:3]
        target = wanted[key] if rows is None else wanted[key].narrow(*rows)
        target.copy_(value if change is None else change(value))
    model.diffusion_model.load_state_dict(wanted)
    model.eval().requires_grad_(False)
    return ModelPatcher(model, management.get_torch_device(), torch.device("cpu"))


def conditioning(spec):
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(1, TOKENS, spec.context_dim, generator=generator)
    pooled = torch.randn(1, POOLED, generator=generator)
    return context, pooled, [[context, {"pooled_output": pooled, "guidance": 3.5}]]


def unet_conditioning(spec, seed=6):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 7, spec.cross_attention_dim, generator=generator)
    sizes = {"height": 64, "width": 64, "crop_h": 0, "crop_w": 0, "target_height": 64, "target_width": 64}
    return [[context, {"pooled_output": torch.randn(1, 1280, generator=generator), **sizes}]]


def flux_call(x, sigma, context, pooled):
    rows = SIDE // 2
    packed = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    places = torch.cartesian_prod(torch.tensor([0]), torch.arange(rows), torch.arange(rows))
    return {
        "hidden_states": packed.reshape(x.shape[0], rows * rows, -1), "timestep": sigma.expand(len(x)),
        "encoder_hidden_states": context.expand(len(x), -1, -1), "guidance": torch.full((len(x),), 3.5),
        "pooled_projections": pooled.expand(len(x), -1), "img_ids": places, "txt_ids": torch.zeros(TOKENS, 3),
    }  # fmt: skip


def flux_velocity(tokens):
    rows = SIDE // 2
    unpacked = tokens.reshape(-1, rows, rows, 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return unpacked.reshape(-1, 4, SIDE, SIDE)


def sd3_call(x, sigma, context, pooled):
    return {
        "hidden_states": x, "timestep": 1000 * sigma.expand(len(x)),
        "encoder_hidden_states": context.expand(len(x), -1, -1),
        "pooled_projections": pooled.expand(len(x), -1),
    }  # fmt: skip


def unet_models(spec):
    import comfy.supported_models as kinds
    import comfy.utils as utils
    from diffusers import UNet2DConditionModel

    is_xl = spec.family == "sdxl"
    attends = [depth > 0 for depth in spec.transformer_layers]
    kinds_of = [("CrossAttn" if a else "") for a in attends]
    more = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
    } if is_xl else {}  # fmt: skip
    ours = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=spec.block_out_channels,
        layers_per_block=spec.layers_per_block, cross_attention_dim=spec.cross_attention_dim,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds_of],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds_of)],
        transformer_layers_per_block=[depth or 1 for depth in spec.transformer_layers],
        attention_head_dim=1 if is_xl else 8, **more,
    )  # fmt: skip
    config = host_unet_config(spec) | {
        "image_size": 32, "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False,
        "use_linear_in_transformer": is_xl, "adm_in_channels": 2816 if is_xl else None,
        "num_classes": "sequential" if is_xl else None, "num_heads": 8, "num_head_channels": -1,
    }  # fmt: skip
    kind = kinds.SDXL if is_xl else kinds.SD15
    return ours, host_model(kind, config, ours, utils.unet_to_diffusers(config))


FAMILIES = {
    "flux": (FLUX, flux_models, flux_call, flux_velocity),
    "sd3": (SD3, sd3_models, sd3_call, lambda velocity: velocity),
}


def euler_in_comfyui(model, noise, positive, sigmas, negative=None, cfg=1.0):
    import comfy.samplers

    with torch.inference_mode():
        return comfy.samplers.sample(
            model, noise, positive, negative or positive, cfg, model.load_device,
            comfy.samplers.sampler_object("euler"), torch.tensor(sigmas), model_options=model.model_options,
            latent_image=torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip


def euler_in_diffusers(transformer, noise, call, velocity, context, pooled):
    x = noise
    for sigma, following in itertools.pairwise(SIGMAS):
        arguments = call(x, torch.tensor(sigma), context, pooled)
        x = x + (following - sigma) * velocity(transformer(**arguments, return_dict=False)[0])
    return x
