"""Sampling towards a greater reward."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hyperalign.hosts.comfy import guidance as comfy_guidance
from .aliases import aliases
from .choices import choice_problem
from .sockets import RewardType


class HyperAlignGuidance(io.ComfyNode):
    """Patches a MODEL with gradient guidance by a reward."""

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
            description="Makes a MODEL sample towards a greater reward, by the reward's gradient on the image "
            "foreseen at each step. Each guided step adds a decoding and a reward, forwards and backwards: "
            "about 3 times the work of SD 1.5, 1.3 times that of SDXL, and several GB more memory. Through the "
            "model it costs a backward pass of the model too.",
            inputs=_inputs(),
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model, for any sampler.")],
        )

    @classmethod
    def validate_inputs(cls, gradient: str = "prediction") -> bool | str:
        """Refuses an unknown way of the gradient before anything runs."""
        return choice_problem(cls, gradient=gradient) or True

    @classmethod
    def execute(
        cls, model: Any, reward: Any, vae: Any, prompt: str, strength: float, start_percent: float,
        end_percent: float, side: int, gradient: Any = "prediction",
    ) -> io.NodeOutput:  # fmt: skip
        """Returns the patched clone."""
        window = (start_percent, end_percent)
        guided = comfy_guidance.apply_guidance(model, vae, reward, prompt, strength, window, side, gradient)
        return io.NodeOutput(guided)


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to guide, aligned or not. It is not changed."),
        RewardType.Input("reward", tooltip="From Reward Model Loader. A chain by rank has no gradient."),
        io.Vae.Input("vae", tooltip="The model's VAE; a copy of it decodes the foreseen images."),
        io.String.Input(
            "prompt",
            multiline=True,
            default="a red heart",
            tooltip="The prompt the reward judges against, usually that of the sampler; one line for all images of "
            "a batch or one per image. 0 lines = the empty prompt.",
        ),
        io.Float.Input(
            "strength",
            default=0.1,
            min=-2.0,
            max=2.0,
            step=0.01,
            tooltip="Size of each correction, as a part of the foreseen image's contrast (through model: as a part "
            "of what cfg adds). 0 = off, the image of the model without guidance, bit for bit; above 0.3 (through "
            "model: 1) the reward is soon deceived; below 0 = away from it.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Where in the run guidance begins, as a fraction of the noise range. 0 = from pure noise on, "
            "where little can be foreseen.",
        ),
        io.Float.Input(
            "end_percent",
            default=0.7,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Where it ends, as a fraction of the noise range. 1 = guided to the end; must lie above "
            "start_percent, so 0 is refused. A shorter window costs less.",
        ),
        io.Int.Input(
            "side",
            default=512,
            min=64,
            max=4096,
            step=64,
            tooltip="Longest side in pixels at which foreseen images are decoded for the reward; the result keeps "
            "its size. Smaller = less time and memory: 256 is a quarter of 512; 0 is refused.",
        ),
        io.Combo.Input(
            "gradient",
            options=list(comfy_guidance.GRADIENTS),
            default="prediction",
            optional=True,
            tooltip="Where the reward's gradient goes. prediction = to the foreseen image (MPGD), which goes with "
            "every model; through model = on through the model to the noisy image (FreeDoM, DyMO): 3 to 4 times the "
            "model's work in each guided step, and 1 GB or more for SD 1.5 at 512 pixels, 2 with a hypernetwork.",
        ),
    ]
