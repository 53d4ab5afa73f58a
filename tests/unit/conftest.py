"""Small models with random weights, and a hypernetwork that changes them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hyperalign.checkpoint import Header, HyperAlign
from hyperalign.families.unet import TINY
from hyperalign.hosts.diffusers.adapter import spec_of
from hyperalign.hosts.diffusers.session import denoiser_of
from hyperalign.hypernetwork import Conditioning, HyperNetwork, HyperNetworkConfig
from hyperalign.schedule import Schedule
from hyperalign.targets import BaseSpec, PerceptionMode
from hyperalign.tiny.weights import UNET_CONFIG


@pytest.fixture(scope="session")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET_CONFIG).eval().requires_grad_(False)


def _hyperalign(
    mode: PerceptionMode = "prefix",
    schedule: Schedule | None = None,
    conditioning: Conditioning = "full",
    trained: bool = True,
    spec: BaseSpec = TINY,
    perception_blocks: int = 0,
    seed: int = 1,
) -> HyperAlign:
    """Returns a random hypernetwork; `trained` gives B_aux values, so that it changes the model."""
    torch.manual_seed(seed)
    config = HyperNetworkConfig(conditioning=conditioning)
    targets = spec.targets(mode, perception_blocks)
    network = HyperNetwork(config, targets, spec.feature_channels, spec.text_channels)
    if trained:
        for b_aux in network.b_aux:
            torch.nn.init.normal_(b_aux, std=0.02)
    header = Header(
        spec.fingerprint(),
        mode,
        spec.feature_channels,
        spec.text_channels,
        targets,
        config,
        schedule or Schedule("S"),
        {"note": "random"},
        perception_blocks=perception_blocks,
    )
    return HyperAlign(network, header)


def _inputs(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns noisy latents, timesteps and context of as many different rows."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 4, 16, 16, generator=generator)
    t = torch.tensor([700, 700, 30, 999][:rows])
    return x, t, torch.randn(rows, 16, 128, generator=generator)


@pytest.fixture(scope="session")
def make_hyperalign() -> Callable[..., HyperAlign]:
    """Builds a random hypernetwork: mode, schedule, conditioning, trained."""
    return _hyperalign


@pytest.fixture(scope="session")
def inputs() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Builds rows of latents, timesteps and context."""
    return _inputs


TOKENS, POOLED, CONTEXT = 8, 16, 48


def _unet(context: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=context,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        norm_num_groups=8, attention_head_dim=8, **more,
    )  # fmt: skip


def _ddim() -> DDIMScheduler:
    """Starts at the last timestep, so that a run begins at pure noise."""
    return DDIMScheduler(clip_sample=False, steps_offset=1, timestep_spacing="trailing")


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Returns a tokenizer that spells: one token a letter."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, model_max_length=TOKENS, pad_token="<|endoftext|>")


def _stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    """Returns a whole pipeline: it reads text and draws images."""
    tokenizer = _tokenizer(folder)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=CONTEXT, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=52, eos_token_id=53,
            pad_token_id=53,
        )
    )  # fmt: skip
    autoencoder = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer, unet=_unet(CONTEXT),
        scheduler=_ddim(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _stable_diffusion_xl(_: Path) -> StableDiffusionXLPipeline:
    unet = _unet(
        CONTEXT, addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True,
        projection_class_embeddings_input_dim=POOLED + 6 * 8, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=_ddim(),
    )  # fmt: skip


def _stable_diffusion_3(_: Path) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=CONTEXT, caption_projection_dim=32,
        pooled_projection_dim=POOLED, pos_embed_max_size=8, dual_attention_layers=(0, 1, 2),
        qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None,
        tokenizer_3=None,
    )  # fmt: skip


def _flux(_: Path) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=4, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=CONTEXT, pooled_projection_dim=POOLED, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd15": _stable_diffusion,
    "sdxl": _stable_diffusion_xl,
    "sd3": _stable_diffusion_3,
    "flux": _flux,
}


@pytest.fixture(params=list(PIPELINES))
def pipe(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Each class of pipeline with random weights, on latents of 8 x 8."""
    return make_pipe(request.param, tmp_path)


@pytest.fixture
def sd15_pipe(tmp_path: Path) -> Any:
    """A StableDiffusionPipeline with random weights."""
    return make_pipe("sd15", tmp_path)


def make_pipe(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    pipeline = PIPELINES[kind](folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _prompt(pipeline: Any, rows: int = 1, seed: int = 3) -> dict[str, Any]:
    """Returns a prompt already encoded, as the pipeline's arguments."""
    base = pipeline.components.get("transformer") or pipeline.unet
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator).expand(rows, *shape).to(base.dtype)

    accepted = inspect.signature(type(pipeline).__call__).parameters
    is_flux = isinstance(base, FluxTransformer2DModel)
    arguments: dict[str, Any] = {"prompt_embeds": some(TOKENS, CONTEXT)}
    arguments |= {name: 64 for name in ("height", "width") if name in accepted}
    if "pooled_prompt_embeds" in accepted:
        arguments["pooled_prompt_embeds"] = some(POOLED)
    if not is_flux:
        arguments["negative_prompt_embeds"] = some(TOKENS, CONTEXT)
    if not is_flux and "negative_pooled_prompt_embeds" in accepted:
        arguments["negative_pooled_prompt_embeds"] = some(POOLED)
    return arguments


@pytest.fixture(scope="session")
def make_for(make_hyperalign: Callable[..., HyperAlign]) -> Callable[..., HyperAlign]:
    """Builds a random hypernetwork that fits a pipeline, ready for inference."""

    def build(pipeline: Any, mode: PerceptionMode = "prefix", **options: Any) -> HyperAlign:
        spec = spec_of(denoiser_of(pipeline))
        made = make_hyperalign(mode, spec=spec, perception_blocks=2, **options)
        made.network.eval().requires_grad_(False)
        return made

    return build


@pytest.fixture(scope="session")
def prompt_of() -> Callable[..., dict[str, Any]]:
    """Makes a prompt already encoded, as a pipeline's arguments."""
    return _prompt


@pytest.fixture(scope="session")
def draw() -> Callable[..., torch.Tensor]:
    """Runs a pipeline to latents (B, ...)."""

    def run(
        pipeline: Any, rows: int = 1, prompt: int = 3, seed: int = 7, steps: int = 3, **options: Any
    ) -> torch.Tensor:
        arguments = _prompt(pipeline, rows, prompt) | {"num_inference_steps": steps} | options
        generator = torch.Generator().manual_seed(seed)
        return pipeline(**arguments, generator=generator, output_type="latent").images.clone()

    return run
