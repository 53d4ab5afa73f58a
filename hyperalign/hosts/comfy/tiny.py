"""The embedded tiny model as the host's own MODEL, CLIP and VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.diffusers_convert import convert_vae_state_dict
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...errors import HyperAlignError
from ...tiny.text_encoder import CONTEXT_LENGTH, END, PAD, START, VOCABULARY, TinyTextEncoder, word_ids
from ...tiny.weights import load_part

LATENT_CHANNELS = 4
LATENT_SIZE = 16
PIXELS_PER_LATENT = 4
CLIP_NAME = "tiny"

UNET_CONFIG: dict[str, Any] = {
    "image_size": LATENT_SIZE,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": 64,
    "channel_mult": [1, 2, 2],
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [1] * 6,
    "transformer_depth_middle": 1,
    "context_dim": 128,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "dtype": torch.float32,
}
"""`tiny.weights.UNET_CONFIG` in the host's format."""

VAE_CONFIG: dict[str, Any] = {
    "embed_dim": LATENT_CHANNELS,
    "ddconfig": {
        "double_z": True,
        "z_channels": LATENT_CHANNELS,
        "resolution": LATENT_SIZE * PIXELS_PER_LATENT,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}
"""`tiny.weights.AUTOENCODER_CONFIG` in the host's format."""


class TinyLatent(comfy.latent_formats.LatentFormat):
    """Latents of the embedded autoencoder: 4 channels, 4 pixels per latent."""

    latent_channels = LATENT_CHANNELS
    spacial_downscale_ratio = PIXELS_PER_LATENT  # the host's spelling; newer releases read it


class TinyConfig(comfy.supported_models_base.BASE):
    """The host's config of the embedded U-Net; noise schedule and prediction type are the defaults (SD)."""

    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}  # noqa: RUF012 - the host's convention
    latent_format = TinyLatent


def load_tiny() -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """Returns MODEL, CLIP and VAE of the committed weights.

    Raises HyperAlignError if a file is missing or damaged.
    """
    unet, _ = load_part("unet")
    text_encoder, _ = load_part("text_encoder")
    autoencoder, header = load_part("autoencoder")
    vae = build_vae(autoencoder)
    model = build_model(unet, float(header["scaling_factor"]))
    return model, build_clip(text_encoder), vae


def empty_latents(batch: int) -> Tensor:
    """Returns zeros (B, 4, 16, 16) on the device where the host keeps latents.

    Raises HyperAlignError unless `batch` is at least 1.
    """
    if batch < 1:
        raise HyperAlignError(f"batch_size is {batch}; expected at least 1. Use 1 for one image.")
    size = (batch, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    return torch.zeros(size, device=comfy.model_management.intermediate_device())


def build_model(state: Mapping[str, Tensor], scaling_factor: float) -> ModelPatcher:
    """Returns a MODEL from diffusers-named U-Net weights. Raises HyperAlignError if they do not fit."""
    config = TinyConfig(UNET_CONFIG)
    config.latent_format.scale_factor = scaling_factor
    names: dict[str, str] = comfy.utils.unet_to_diffusers(config.unet_config)
    unknown = sorted(set(state) - set(names))
    if unknown:
        raise HyperAlignError(
            f"The tiny U-Net's file has unknown weights ({unknown[0]}). Reinstall the pack."
        )
    model = comfy.model_base.BaseModel(config, device=comfy.model_management.unet_offload_device())
    _fill(model.diffusion_model, {names[key]: value for key, value in state.items()}, "unet")
    return ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def build_vae(state: Mapping[str, Tensor]) -> comfy.sd.VAE:
    """Returns a VAE from diffusers-named autoencoder weights (factor 4)."""
    converted = _vae_names(state)
    vae = comfy.sd.VAE(sd=converted, config={"params": VAE_CONFIG}, dtype=torch.float32)
    # The host only warns about weights that do not fit.
    _fill(cast(nn.Module, vae.first_stage_model), converted, "autoencoder")
    vae.downscale_ratio = PIXELS_PER_LATENT
    vae.upscale_ratio = PIXELS_PER_LATENT
    return vae


def build_clip(state: Mapping[str, Tensor]) -> comfy.sd.CLIP:
    """Returns a CLIP around the embedded text encoder."""
    target = comfy.supported_models_base.ClipTarget(TinyTokenizer, TinyClip)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    clip.cond_stage_model.load_sd(state)
    return clip


class TinyTokenizer:
    """Splits text into chunks of 16 (token, weight) pairs, with the host's (word:1.2) syntax."""

    def __init__(
        self, embedding_directory: Any = None, tokenizer_data: Mapping[str, Any] | None = None
    ) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, Any]:
        """Returns chunks of (token, weight), or (token, weight, word).

        Raises HyperAlignError on unknown words.
        """
        escaped = comfy.sd1_clip.escape_important(text)
        pairs: list[tuple[int, float]] = []
        for segment, weight in comfy.sd1_clip.token_weights(escaped, 1.0):
            pairs += [(token, weight) for token in word_ids(comfy.sd1_clip.unescape_important(segment))]
        room = CONTEXT_LENGTH - 2
        chunks = [_framed(pairs[i : i + room]) for i in range(0, max(1, len(pairs)), room)]
        if return_word_ids:
            chunks = [
                [(*pair, 0 if pair[0] <= END else i) for i, pair in enumerate(chunk)] for chunk in chunks
            ]
        return {CLIP_NAME: chunks}

    def untokenize(self, token_weight_pair: Sequence[tuple[Any, ...]]) -> list[tuple[tuple[Any, ...], str]]:
        """Returns each pair with its word, as the host's tokenizers do."""
        return [(pair, VOCABULARY[pair[0]]) for pair in token_weight_pair]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns nothing: the vocabulary is part of the code."""
        return {}


class TinyClip(nn.Module, comfy.sd1_clip.ClipTokenWeightEncoder):
    """TinyTextEncoder behind the host's text model interface."""

    special_tokens = {"start": START, "end": END, "pad": PAD}  # noqa: RUF012 - the host's convention

    def __init__(
        self,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.text_encoder = TinyTextEncoder().eval().to(device=device, dtype=dtype)
        self.dtypes = {dtype or torch.float32}

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        """Ignores the host's options: the encoder has no intermediate layer to stop at (clip skip)."""

    def reset_clip_options(self) -> None:
        """Does nothing: there are no options to reset."""

    def encode_token_weights(self, token_weight_pairs: Mapping[str, Any]) -> Any:
        """Returns context (1, 16 * chunks, 128) with weighted tokens moved away from the empty prompt."""
        return super().encode_token_weights(token_weight_pairs[CLIP_NAME])

    def encode(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Returns context (chunks, 16, 128) and its first token (chunks, 128)."""
        device = self.text_encoder.position_embedding.device
        with torch.no_grad():
            context_BLC = self.text_encoder(torch.tensor(tokens, dtype=torch.long, device=device)).float()
        return context_BLC, context_BLC[:, 0]

    def load_sd(self, sd: Mapping[str, Tensor]) -> None:
        """Loads the embedded weights. Raises HyperAlignError if they do not fit."""
        _fill(self.text_encoder, sd, "text_encoder")


def _framed(pairs: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    padding = [(PAD, 1.0)] * (CONTEXT_LENGTH - 2 - len(pairs))
    return [(START, 1.0), *pairs, (END, 1.0), *padding]


def _vae_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts diffusers' names; the host's mapping counts up blocks of four levels, this model has three."""
    converted: dict[str, Tensor] = convert_vae_state_dict(dict(state))
    levels = len(VAE_CONFIG["ddconfig"]["ch_mult"])
    for level in range(levels):
        shift = {f"decoder.up.{level + 4 - levels}.": f"decoder.up.{level}."}
        converted = comfy.utils.state_dict_prefix_replace(converted, shift)
    return converted


def _fill(module: nn.Module, state: Mapping[str, Tensor], part: str) -> None:
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise HyperAlignError(
            f"The weights in {part}.safetensors do not fit this release ({error}). "
            "Reinstall the pack, or rebuild them with `python train/tiny/build.py`."
        ) from error
