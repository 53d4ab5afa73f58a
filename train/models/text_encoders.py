"""The text encoders of a recipe's base model: loading, padding, and the fingerprint of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line
from train.config import TrainConfig
from train.data.random_inputs import TEXT_WIDTHS
from train.models.base import Conditions
from train.models.fingerprint import files_digest
from train.models.load import LOAD_ERRORS, PIPELINES, backbone_dtype, check_folder
from train.models.stable_diffusion import CLIP_TOKENS

MB, GB = 1e6, 1e9


def text_lengths(config: TrainConfig) -> tuple[int, ...]:
    """Returns the numbers of tokens that prompts are padded to."""
    return config.data.text_lengths if PIPELINES[config.model.base].variable_length else (CLIP_TOKENS,)


def context_tokens(config: TrainConfig, padding: int) -> int:
    """Returns how many text tokens the base model reads at a padding; SD 3.5 reads CLIP's before T5's."""
    return padding + CLIP_TOKENS * (config.model.base == "sd3")


def text_bytes(config: TrainConfig) -> tuple[int, ...]:
    """Returns the bytes of a text's conditions at each padding.

    The padding is part of them: no pipeline masks it, so its vectors depend on the text and on its length.
    """
    width, pooled = TEXT_WIDTHS[config.model.base]
    size = backbone_dtype(config).itemsize
    return tuple(size * (context_tokens(config, length) * width + pooled) for length in text_lengths(config))


def check_cache_limit(config: TrainConfig, new: Sequence[int]) -> None:
    """Checks the size of the cache of embeddings before texts are encoded.

    Args:
        config: the recipe.
        new: how many texts must be encoded, for each padding.

    Raises:
        HyperAlignError: with them the folder would hold more than `data.embeddings_limit_gb`.
    """
    data, each = config.data, text_bytes(config)
    there = sum(path.stat().st_size for path in data.embeddings.rglob("*.safetensors"))
    added = sum(count * size for count, size in zip(new, each, strict=True))
    if not added or there + added <= data.embeddings_limit_gb * GB:
        return
    one = f"set data.text_lengths to [{min(data.text_lengths)}] alone, " if len(each) > 1 else ""
    raise HyperAlignError(
        f"The embeddings of {max(new)} new texts take {added / GB:.1f} GB ({sum(each) / MB:.1f} MB a text), "
        f"and {data.embeddings} holds {there / GB:.1f} GB; expected at most data.embeddings_limit_gb, "
        f"{data.embeddings_limit_gb:g} GB. Raise it, {one}name fewer data.prompts (train/prompt_sets.py "
        "--train), encode fewer images (train/encode.py --limit), or delete what other runs left there."
    )


def load_text_pipeline(config: TrainConfig, device: torch.device) -> Any:
    """Returns diffusers' pipeline with the text encoders alone, in the precision of the backbone.

    Raises:
        HyperAlignError: an encoder or a tokenizer is missing or cannot be read.
    """
    classes, folder = PIPELINES[config.model.base], check_folder(config)
    without: dict[str, Any] = {classes.subfolder: None, "vae": None}
    try:
        pipeline: Any = classes.pipeline.from_pretrained(
            folder, torch_dtype=backbone_dtype(config), local_files_only=True, **without
        )
    except LOAD_ERRORS as error:
        raise HyperAlignError(
            f"The text encoders in {folder} cannot be read: {first_line(error)} Copy model_index.json and "
            "the folders text_encoder* and tokenizer* from the base model again."
        ) from error
    return pipeline.to(device)


def load_text_encoders(
    config: TrainConfig, device: torch.device
) -> Callable[[Sequence[str], int], Conditions]:
    """Returns a function from prompts and a padding to conditions. Raises as `load_text_pipeline`."""
    return prompt_function(config, load_text_pipeline(config, device))


def prompt_function(config: TrainConfig, pipeline: Any) -> Callable[[Sequence[str], int], Conditions]:
    """Returns a function from prompts and a padding to conditions, with a pipeline's text encoders."""
    encode_prompts = PIPELINES[config.model.base].encode_prompts

    @torch.no_grad()
    def encode(prompts: Sequence[str], length: int) -> Conditions:
        return encode_prompts(pipeline, prompts, length)

    return encode


def text_fingerprint(config: TrainConfig) -> str:
    """Returns the name of the encoders' outputs in a cache: it depends on their files and the precision.

    Raises:
        HyperAlignError: the folder of the base model is missing, or a file in it cannot be read.
    """
    folders = sorted(check_folder(config).glob("t*/*"))  # text_encoder*, tokenizer*
    files = [path for path in folders if path.parent.name.startswith(("text_encoder", "tokenizer"))]
    start = f"{config.model.base} {backbone_dtype(config)}"
    digest = files_digest(start, (path for path in files if path.is_file()))
    return f"{config.model.base}-{digest[:12]}"
