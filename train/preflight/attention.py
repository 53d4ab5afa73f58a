"""Whether the chosen attention kernels run on this GPU at the recipe's true shape, in both directions."""

from __future__ import annotations

import torch

from hyperalign.errors import HyperAlignError
from train.config import BaseName, TrainConfig
from train.data.random_inputs import TEXT_WIDTHS, RandomPromptEncoder
from train.models.architectures import ModelSize, architecture, autoencoder, with_random_weights
from train.models.autoencoder import Autoencoder
from train.models.base import with_guidance
from train.models.kernels import attention_kernels
from train.models.load import backbone_dtype, make_base
from train.models.text_encoders import context_tokens, text_lengths

ONE_BLOCK: dict[BaseName, ModelSize] = {
    "sd15": ModelSize(),
    "sdxl": ModelSize(),
    "flux": ModelSize(double_blocks=1, single_blocks=1),
    "sd3": ModelSize(double_blocks=1),
}
"""One block of each kind of a transformer; a U-Net's blocks differ, so all of it."""


def try_attention(config: TrainConfig, device: torch.device, size: ModelSize | None = None) -> str:
    """Runs one forward and one backward pass of random weights; returns what was run.

    Args:
        config: the recipe: its resolution, text length, precision and kernels are those of the pass.
        device: of the pass.
        size: of the backbone; None is `ONE_BLOCK`.

    Raises:
        HyperAlignError: a kernel fails.
    """
    name, kernels = config.model.base, ", ".join(config.run.attention_kernels)
    with torch.device("meta"):
        backbone, images = architecture(name, size or ONE_BLOCK[name]), Autoencoder(autoencoder(name))
    backbone = with_random_weights(backbone, device, backbone_dtype(config))
    base = make_base(config, backbone, images, "epsilon")
    width, pooled = TEXT_WIDTHS[name]
    tokens = context_tokens(config, max(text_lengths(config)))
    conditions = RandomPromptEncoder(width, pooled, (tokens,), device).conditions([""])
    x = torch.randn(1, *base.latent_shape, device=device, requires_grad=True)
    try:
        with attention_kernels(config.run.attention_kernels, device):
            call = base.call(x, torch.full((1,), 0.5, device=device), with_guidance(base, conditions, 1.0))
            backbone(**call)[0].float().square().mean().backward()
            finite = x.grad is not None and bool(x.grad.isfinite().all())
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise HyperAlignError(
            f"attention of {name} at {config.model.resolution} pixels fails here with the kernels {kernels}: "
            f"{first}. Set run.attention_kernels to others of flash, efficient, cudnn, math."
        ) from error
    if not finite:
        raise HyperAlignError(
            f"attention of {name} with the kernels {kernels} returns a gradient that is not finite; set "
            "run.attention_kernels to others of flash, efficient, cudnn, math."
        )
    return f"attention: {kernels}, in this order; a block at {config.model.resolution} pixels ran both ways"
