"""Sampling towards a higher reward."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hyperalign.hosts.comfy.guidance import GRADIENTS, apply_guidance
from ..hyperalign.prompts import LINES
from .aliases import aliases
from .choices import check_choices, choice_problem
from .sockets import RewardType, lines_input


class HyperAlignGuidance(io.ComfyNode):
    """Patches a MODEL with reward gradient guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignGuidance",
            display_name="Reward Guidance",
            category="HyperAlign",
            **aliases(
                "gradient guidance", "universal guidance", "classifier guidance", "freedom", "dymo", "mpgd"
            ),
            description="Makes a MODEL sample towards a higher reward, using the reward's gradient at the image predicted "
            "at each step. Each guided step adds a forward and backward pass of VAE decoder and reward: about 3 times "
            "the compute of SD 1.5 and 1.3 times that of SDXL, and several GB of memory. With gradient = through "
            "model, a backward pass of the model is added.",
            inputs=_inputs(),
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model, for any sampler.")],
        )

    @classmethod
    def validate_inputs(cls, gradient: str | None = None, lines: str | None = None) -> bool | str:
        """Rejects unknown choices before anything runs."""
        return choice_problem(cls, gradient=gradient, lines=lines) or True

    @classmethod
    def execute(
        cls, model: Any, reward: Any, vae: Any, prompt: str, strength: float, start_percent: float,
        end_percent: float, decode_size: int, gradient: Any = "prediction",
        lines: Any = LINES[0],
    ) -> io.NodeOutput:  # fmt: skip
        """Returns the patched clone."""
        check_choices(cls, gradient=gradient, lines=lines)
        window = (start_percent, end_percent)
        guided = apply_guidance(
            model, vae, reward, prompt, strength, window, decode_size, gradient, lines=lines
        )
        return io.NodeOutput(guided)


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to guide, aligned or not. It is not changed."),
        RewardType.Input(
            "reward",
            tooltip="From Reward Model Loader. A chain with combination rank has no gradient and is rejected.",
        ),
        io.Vae.Input("vae", tooltip="The model's VAE; a copy of it decodes the predicted images."),
        io.String.Input(
            "prompt",
            multiline=True,
            default="a red heart",
            tooltip="The prompt that images are scored against, usually that of the sampler; it may have several lines, see "
            "lines. Empty = the empty prompt.",
        ),
        *_strength_inputs(),
        io.Int.Input(
            "decode_size",
            default=512,
            min=64,
            max=4096,
            step=64,
            tooltip="Maximum side length, in pixels, at which predicted images are decoded for the reward; the size of the "
            "result does not change. Smaller = less time and memory: 256 needs a quarter of 512. 0 is rejected.",
        ),
        io.Combo.Input(
            "gradient",
            options=list(GRADIENTS),
            default="prediction",
            optional=True,
            tooltip="What the reward is differentiated with respect to. prediction = the predicted image (MPGD), works with "
            "every model; through model = the noisy latent, through the model (FreeDoM, DyMO): 3 to 4 times the "
            "model's compute in each guided step, and 1 GB of memory or more for SD 1.5 at 512 pixels, 2 GB with a "
            "hypernetwork.",
        ),
        lines_input(),
    ]


def _strength_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "strength",
            default=0.1,
            min=-2.0,
            max=2.0,
            step=0.01,
            tooltip="Size of each correction, relative to the contrast of the predicted image (through model: relative to "
            "the term that cfg adds). 0 = off, bit-identical to the model without guidance; above 0.3 (through "
            "model: 1) the reward is easily over-optimised; below 0 = towards a lower reward.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Point in sampling at which guidance starts, as a fraction of the noise range. 0 = from pure noise, "
            "where predictions are still poor.",
        ),
        io.Float.Input(
            "end_percent",
            default=0.7,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Point in sampling at which guidance ends, as a fraction of the noise range. 1 = guided to the end; "
            "must be above start_percent, so 0 is rejected. A shorter range costs less.",
        ),
    ]
