"""Base models of true shape with random weights, made in seconds on the device that runs them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hyperalign.checkpoint import Header, HyperAlign
from hyperalign.families.dit import TransformerSpec
from hyperalign.hosts.diffusers.adapter import Call, spec_of
from hyperalign.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperalign.schedule import Schedule
from hyperalign.targets import BaseSpec, PerceptionMode
from train.config import BaseName
from train.models.architectures import ModelSize, architecture, with_random_weights

Name = Literal["sd15", "sdxl", "flux", "sd35"]
TRUE_PIXELS: dict[Name, int] = {"sd15": 512, "sdxl": 1024, "flux": 1024, "sd35": 1024}
TRUE_TOKENS: dict[Name, int] = {"sd15": 77, "sdxl": 77, "flux": 512, "sd35": 333}
"""Length of the text as diffusers' pipelines give it; 333 is CLIP's 77 and T5's 256."""
TRUE_BLOCKS: dict[Name, tuple[int, int]] = {"sd15": (0, 0), "sdxl": (0, 0), "flux": (19, 38), "sd35": (24, 0)}
"""Double (SD 3.5: joint) and single blocks of the transformers."""
PIXELS_PER_LATENT = 8
GUIDANCE = 4.0
FAMILIES: dict[Name, BaseName] = {"sd15": "sd15", "sdxl": "sdxl", "flux": "flux", "sd35": "sd3"}
KEY_TIMES = (0.7, 0.4)
"""With the first evaluation's, P generates weights three times."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a base model is built and what it is asked to draw."""

    pixels: int
    text_tokens: int
    double_blocks: int
    single_blocks: int
    narrow: int = 1
    """Divides the width of every layer."""

    def reductions(self, name: Name) -> list[str]:
        """Returns what is smaller than the true model at its usual size, in words."""
        double, single = TRUE_BLOCKS[name]
        pairs = [
            (self.pixels, TRUE_PIXELS[name], "px"),
            (self.text_tokens, TRUE_TOKENS[name], "text tokens"),
            (self.double_blocks, double, "joint blocks" if name == "sd35" else "double blocks"),
            (self.single_blocks, single, "single blocks"),
        ]
        words = [f"{found} {what} instead of {true}" for found, true, what in pairs if found != true]
        return words + ([f"layers {self.narrow} times narrower"] if self.narrow != 1 else [])


def true_size(name: Name) -> Size:
    """Returns a model's own size."""
    return Size(TRUE_PIXELS[name], TRUE_TOKENS[name], *TRUE_BLOCKS[name])


@dataclass(frozen=True, slots=True)
class Base:
    """A base model with everything of a call but latents and time."""

    model: nn.Module
    spec: BaseSpec
    noise: Tensor
    """Latents (1, ...) in the model's own layout."""
    conditions: Call
    rows: int
    """Rows of one forward: 2 with classifier-free guidance, 1 where guidance is an input."""

    def call(self, x_1: Tensor, t: Tensor) -> Call:
        """Returns the arguments of one forward on latents (1, ...) at a timestep."""
        latents = "sample" if isinstance(self.model, UNet2DConditionModel) else "hidden_states"
        return {latents: torch.cat([x_1] * self.rows), "timestep": t.expand(self.rows), **self.conditions}

    def guided(self, prediction_B: Tensor) -> Tensor:
        """Returns the prediction (1, ...) after guidance."""
        if self.rows == 1:
            return prediction_B
        without, conditional = prediction_B.chunk(2)
        return without + GUIDANCE * (conditional - without)


def build(name: Name, size: Size, device: torch.device, dtype: torch.dtype) -> Base:
    """Returns a base model with random weights. Raises HyperAlignError if a width cannot be divided."""
    with torch.device("meta"):
        model = architecture(FAMILIES[name], ModelSize(size.double_blocks, size.single_blocks, size.narrow))
    model = with_random_weights(model, device, dtype)
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    rows = 1 if name == "flux" else 2
    side = size.pixels // PIXELS_PER_LATENT
    spec = spec_of(model)
    width = spec.fingerprint()["cross_attention_dim" if name in ("sd15", "sdxl") else "context_dim"]
    conditions: dict[str, Any] = {"encoder_hidden_states": random(rows, size.text_tokens, width)}
    noise = random(1, 16 if name == "sd35" else 4, side, side)
    if name == "sdxl":
        sizes = torch.tensor([[size.pixels, size.pixels, 0, 0, size.pixels, size.pixels]], device=device)
        conditions["added_cond_kwargs"] = {
            "text_embeds": random(rows, 1280),
            "time_ids": sizes.expand(rows, -1).to(dtype),
        }
    elif name == "sd35":
        conditions["pooled_projections"] = random(rows, 2048)
    elif name == "flux":
        axis = torch.arange(side // 2, device=device)
        noise = random(1, (side // 2) ** 2, 64)
        conditions |= {
            "pooled_projections": random(rows, 768),
            "guidance": torch.full((rows,), 3.5, device=device, dtype=dtype),
            "img_ids": torch.cartesian_prod(axis[:1], axis, axis).to(dtype),
            "txt_ids": torch.zeros(size.text_tokens, 3, device=device, dtype=dtype),
        }
    return Base(model, spec, noise, conditions, rows)


def random_hyperalign(
    spec: BaseSpec,
    mode: PerceptionMode,
    config: HyperNetworkConfig,
    perception_blocks: int,
    device: torch.device,
    operations: ModuleType | Any = nn,
) -> HyperAlign:
    """Returns a hypernetwork with random weights that changes the base a little.

    `perception_blocks` counts for transformers alone; `operations` is where its layers come from.
    """
    blocks = perception_blocks if isinstance(spec, TransformerSpec) else 0
    targets = spec.targets(mode, blocks)
    torch.manual_seed(1)
    with torch.device(device):
        network = HyperNetwork(config, targets, spec.feature_channels, spec.text_channels, operations)
    for parameter in network.parameters():
        if parameter.dim() > 1:  # a host may leave its layers empty
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif operations is not nn:
            nn.init.zeros_(parameter)
    for b_aux in network.b_aux:  # not larger: a random model with large changes amplifies rounding
        nn.init.normal_(b_aux, std=0.02)
    header = Header(
        spec.fingerprint(), mode, spec.feature_channels, spec.text_channels, targets, config,
        Schedule("P", KEY_TIMES), perception_blocks=blocks,
    )  # fmt: skip
    return HyperAlign(network.eval().requires_grad_(False), header)


def twin(model: nn.Module) -> nn.Module:
    """Returns a second model over the very same weights, so that a change to one leaves the other alone."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
