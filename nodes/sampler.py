"""KSampler and Apply HyperAlign in one node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hyperalign.hosts.comfy.model import apply
from ..hyperalign.hosts.comfy.sampling import SAMPLERS, SCHEDULERS, check_steps, ksample
from ..hyperalign.hosts.comfy.trace import recorder_for, wanted
from .aliases import aliases
from .choices import check_choices, choice_problem
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
    """Samples with ComfyUI's own samplers on an aligned model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignSampler",
            display_name="HyperAlign Sampler (S/P/I)",
            category="HyperAlign",
            **aliases("ksampler", "aligned ksampler", "sample"),
            description="KSampler with a hypernetwork: the same as Apply HyperAlign followed by KSampler. The hypernetwork "
            "reads the latent being denoised and generates weights for the model, so that the image matches the "
            "prompt and human preference better. Preview and progress bar are those of KSampler.",
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
                    "For HyperAlign Trace or HyperAlign Trace PCA. Nothing is recorded unless it is connected."
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, variant: str | None = None, sampler_name: str | None = None, scheduler: str | None = None
    ) -> bool | str:
        """Rejects unknown choices before anything runs; the host itself checks numbers."""
        chosen = {"variant": variant, "sampler_name": sampler_name, "scheduler": scheduler}
        return choice_problem(cls, **chosen) or True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Makes the host sample again when the trace output gets connected."""
        return wanted(TRACE_OUTPUT)

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
        """Returns the sampled latents, and the recorder of the run or None if trace is not connected."""
        check_choices(cls, variant=variant, **sampling)
        check_steps(sampling["steps"])
        recorder = recorder_for(TRACE_OUTPUT)
        aligned = apply(
            model, hypernetwork, strength, variant=variant, strength_curve=strength_curve, recorder=recorder
        )
        latent = ksample(aligned, latent=latent_image, **sampling)
        return io.NodeOutput(latent, recorder)


def _sockets() -> list[io.Input]:
    return [
        io.Model.Input(
            "model", tooltip="The base model the hypernetwork was trained for. It is not changed."
        ),
        HyperAlignType.Input("hypernetwork", tooltip="From HyperAlign Loader."),
        *conditioning_inputs(),
        io.Latent.Input("latent_image", tooltip="The latents to denoise; empty latents for a new image."),
    ]


def sampling_widgets() -> list[io.Input]:
    """Returns KSampler's widgets, for every node that samples."""
    return [
        seed_input("Seed of the initial noise; the same seed gives the same image. 0 is a valid seed."),
        io.Int.Input(
            "steps",
            default=25,
            min=1,
            max=10000,
            tooltip="Number of denoising steps; more steps take longer and give finer details. 0 is rejected.",
        ),
        io.Float.Input(
            "cfg",
            default=4.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Classifier-free guidance scale: how closely the prompt is followed. 1 = no guidance (twice as fast); "
            "0 = the negative prompt only; too high oversaturates the colours.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=SAMPLERS,
            default="euler",
            tooltip="ComfyUI's sampling algorithm. Second-order samplers evaluate the model several times per step; "
            "variant S generates weights at each evaluation.",
        ),
        io.Combo.Input(
            "scheduler",
            options=SCHEDULERS,
            default="normal",
            tooltip="How the noise level decreases over the steps.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Amount of denoising applied to the input latents. 1 = a new image; 0 = the input unchanged.",
        ),
    ]
