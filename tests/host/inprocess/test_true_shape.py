"""A Stable Diffusion 1.5 checkpoint of true shape, random weights, through the host's own nodes."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hyperalign.families.unet import SD15

HOST_CONFIG = {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(comfy, tmp_path_factory) -> Path:
    """One file in the original key layout, half precision, 2.1 GB."""
    import comfy.diffusers_convert as convert
    import comfy.utils as utils
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        text = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12, hidden_size=768, intermediate_size=3072,
                                            num_attention_heads=12))  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def random_like(key, value):
        if value.dim() == 1:
            return torch.full(value.shape, float(key.endswith("weight")), dtype=torch.float16)
        deviation = value[0].numel() ** -0.5
        return torch.empty(value.shape, dtype=torch.float16).normal_(std=deviation, generator=generator)

    def weights(module):
        state = module.state_dict()
        return {key: random_like(key, value) for key, value in state.items() if value.is_floating_point()}

    names = utils.unet_to_diffusers(HOST_CONFIG)
    state = {f"model.diffusion_model.{names[key]}": value for key, value in weights(unet).items()}
    for key, value in weights(text).items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    for key, value in convert.convert_vae_state_dict(weights(vae)).items():
        state[f"first_stage_model.{key}"] = value
    path = tmp_path_factory.mktemp("checkpoints") / "random_sd15.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    yield path
    path.unlink()


def test_load_checkpoint_then_apply_hyperalign(checkpoint, make_hyperalign, runs):
    import folder_paths

    import nodes
    from hyperalign.hosts.comfy.model import apply, spec_of

    folder_paths.add_model_folder_path("checkpoints", str(checkpoint.parent))
    with torch.inference_mode():
        model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(checkpoint.name)
        assert spec_of(model.model) == SD15
        positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a red heart", ""))
        latent = {"samples": torch.zeros(1, 4, 8, 8)}

        def draw(patched):
            arguments = (0, 2, 4.0, "euler", "normal", positive, negative, latent)
            return nodes.KSampler().sample(patched, *arguments)[0]["samples"]

        plain = draw(model)
        aligned = draw(apply(model, make_hyperalign(spec=SD15)))
        assert torch.isfinite(aligned).all()
        assert (aligned - plain).abs().max() > 1e-3
        assert torch.equal(draw(model), plain)
        assert nodes.VAEDecode().decode(vae, {"samples": aligned})[0].shape == (1, 64, 64, 3)
    assert runs()[0] == {"variant": "S", "targets": "80/80", "evaluations": "2", "generations": "2"}


def quantised(state, path):
    """Writes a U-Net as ComfyUI-GGUF's users have it, linear layers in Q8_0; returns it dequantised."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "sd1")
    for key, value in state.items():
        array = value.float().numpy()
        if array.ndim == 2 and array.shape[-1] % 32 == 0:
            blocks = gguf.quants.quantize(array, kind)
            state[key] = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
            writer.add_tensor(key, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(key, array.astype(np.float16 if array.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


@pytest.mark.skipif("HYPERALIGN_GGUF" not in os.environ, reason="HYPERALIGN_GGUF=/path/to/ComfyUI-GGUF, gguf")
def test_gguf_layers_are_added_to(checkpoint, make_hyperalign, runs, caplog):
    import comfy.sample
    import comfy.sd
    import comfy.utils
    import folder_paths

    from hyperalign.hosts.comfy.model import apply

    pack = Path(os.environ["HYPERALIGN_GGUF"])
    spec = importlib.util.spec_from_file_location(
        "gguf_pack", pack / "__init__.py", submodule_search_locations=[str(pack)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["gguf_pack"] = module
    spec.loader.exec_module(module)
    prefix, path = "model.diffusion_model.", checkpoint.parent / "unet.gguf"
    state = {
        key.removeprefix(prefix): value
        for key, value in comfy.utils.load_torch_file(str(checkpoint)).items()
        if key.startswith(prefix)
    }
    state = quantised(state, path)
    folder_paths.folder_names_and_paths["diffusion_models"] = [str(path.parent)], {".gguf"}
    (model,) = module.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(path.name)
    plain, hyperalign = comfy.sd.load_diffusion_model_state_dict(state), make_hyperalign(spec=SD15)
    text = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    def sample(model):
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, 2, 4.0, "euler", "normal", [[text, {}]], [[-text, {}]], torch.zeros_like(noise),
                disable_pbar=True, seed=0,
            )  # fmt: skip

    before, aligned = sample(model), sample(apply(model, hyperalign, merging="merged"))
    assert torch.equal(sample(model), before)
    assert runs()[0]["targets"] == "80/80"
    assert any("kept as GGMLTensor" in message for message in caplog.messages)
    assert (aligned - before).abs().max() > before.std()
    for found, expected in ((before, sample(plain)), (aligned, sample(apply(plain, hyperalign)))):
        # The pack dequantises in half precision.
        torch.testing.assert_close(found / expected.std(), expected / expected.std(), atol=2e-2, rtol=0)
