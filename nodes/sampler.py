"""KSampler and Apply HyperAlign in one node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hyperalign.hosts.comfy import model as host
from ..hyperalign.hosts.comfy import sampling as comfy_sampling
from ..hyperalign.hosts.comfy import trace as comfy_trace
from .aliases import aliases
from .choices import choice_problem
from .sockets import (
    HyperAlignType,
    conditioning_inputs,
    seed_input,
    strength_curve_input,
    strength_input,
    trace_output,
    variant_input,
)

TRACE_OUTPUT = 1


class HyperAlignSampler(io.ComfyNode):
    """The host's own sampling on an aligned model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignSampler",
            display_name="HyperAlign Sampler (S/P/I)",
            category="HyperAlign",
            **aliases("ksampler", "aligned ksampler", "sample"),
            description="KSampler with a hypernetwork: the same as Apply HyperAlign followed by KSampler. The hypernetwork "
            "looks at the image in the making and generates weights into the model, so that the image follows the "
            "prompt and people's preference better. Preview and progress are the usual ones.",
            inputs=[
                *_sockets(),
                *sampling_widgets(),
                variant_input(),
                strength_input(),
                strength_curve_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The denoised latents, for VAE Decode."),
                trace_output(
                    "For HyperAlign Trace or HyperAlign Trace PCA. Costs nothing while it is not connected."
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, variant: str = "auto", sampler_name: str = "euler", scheduler: str = "normal"
    ) -> bool | str:
        """Refuses unknown choices before anything runs; the host itself checks the numbers."""
        chosen = {"variant": variant, "sampler_name": sampler_name, "scheduler": scheduler}
        return choice_problem(cls, **chosen) or True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Makes the host sample again once somebody wants the trace."""
        return comfy_trace.wanted(TRACE_OUTPUT)

    @classmethod
    def execute(
        cls,
        model: Any,
        hypernetwork: Any,
        variant: Any,
        strength: float,
        latent_image: Any,
        strength_curve: Any = None,
        **sampling: Any,
    ) -> io.NodeOutput:
        """Returns the sampled latents and the recorder of the run, None where nobody wants it."""
        comfy_sampling.check_steps(sampling["steps"])
        recorder = comfy_trace.recorder_for(TRACE_OUTPUT)
        aligned = host.apply(
            model, hypernetwork, strength, variant=variant, strength_curve=strength_curve, recorder=recorder
        )
        latent = comfy_sampling.ksample(aligned, latent=latent_image, **sampling)
        return io.NodeOutput(latent, recorder)


def _sockets() -> list[io.Input]:
    return [
        io.Model.Input(
            "model", tooltip="The base model the hypernetwork was trained for. It is not changed."
        ),
        HyperAlignType.Input("hypernetwork", tooltip="From HyperAlign Loader."),
        *conditioning_inputs(),
        io.Latent.Input("latent_image", tooltip="The latents to start from; empty ones for a new image."),
    ]


def sampling_widgets() -> list[io.Input]:
    """Returns KSampler's widgets, for every node that samples."""
    return [
        seed_input(
            "Number that decides the starting noise; the same seed gives the same image. 0 is a seed like any."
        ),
        io.Int.Input(
            "steps",
            default=25,
            min=1,
            max=10000,
            tooltip="Number of denoising steps; more is slower and finer. 0 steps cannot be sampled and are refused.",
        ),
        io.Float.Input(
            "cfg",
            default=4.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="How closely the prompt is followed, as a guidance factor. 1 = no guidance (twice as fast); "
            "0 = the negative prompt alone; too high burns the colours.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=comfy_sampling.SAMPLERS,
            default="euler",
            tooltip="The host's denoising algorithm. Second-order ones evaluate the model several times per step; "
            "variant S generates weights at each evaluation.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy_sampling.SCHEDULERS,
            default="normal",
            tooltip="How noise falls over the steps.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Fraction of noise put on the input latents. 1 = a new image; 0 = the input unchanged.",
        ),
    ]
