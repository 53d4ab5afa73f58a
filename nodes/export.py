"""Saving generated weights as a file for any LoRA loader."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.hosts.comfy.export import DEFAULT_PREFIX, export_lora, workflow_metadata
from .aliases import aliases
from .sockets import HyperAlignType, seed_input, strength_input


class HyperAlignExportLora(io.ComfyNode):
    """Saves the weights generated for one prompt, seed and time as a plain LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignExportLora",
            display_name="Export HyperAlign as LoRA",
            category="HyperAlign",
            **aliases("save lora", "extract lora", "bake", "hypernetwork to lora"),
            description="Saves the weights that a hypernetwork generates for one prompt, seed and time as a plain LoRA in "
            "output/loras, for Load LoRA or for diffusers. Unlike the hypernetwork, the LoRA does not adapt to the "
            "image being generated.",
            is_output_node=True,
            inputs=_inputs(),
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            outputs=[io.String.Output(display_name="path", tooltip="Path of the saved file.")],
        )

    @classmethod
    def execute(
        cls, model: Any, hypernetwork: Any, positive: Any, latent_image: Any, **settings: Any
    ) -> io.NodeOutput:
        """Saves the file and returns its path."""
        workflow = workflow_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        path = export_lora(model, hypernetwork, positive, latent_image, metadata=workflow, **settings)
        return io.NodeOutput(str(path), ui=ui.PreviewText(str(path)))


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input(
            "model", tooltip="The base model the hypernetwork was trained for. It is not changed."
        ),
        HyperAlignType.Input("hypernetwork", tooltip="From HyperAlign Loader."),
        io.Conditioning.Input(
            "positive",
            tooltip="Conditioning of the prompt that the LoRA is exported for, from CLIP Text Encode.",
        ),
        io.Latent.Input(
            "latent_image",
            tooltip="At time 1: an empty latent of the image's size. Below 1: a finished latent (from KSampler or "
            "VAE Encode), to which noise of that time is added. Only the first latent of a batch is used.",
        ),
        seed_input("Seed of the noise in the hypernetwork's input, as in KSampler. 0 is a valid seed."),
        io.Float.Input(
            "time",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Time at which the weights are generated, as a fraction of the noise. 1 = pure noise, where variant I "
            "generates its weights; 0 = the finished image. It decreases during sampling, unlike start_percent.",
        ),
        strength_input(),
        io.String.Input(
            "filename_prefix",
            default=DEFAULT_PREFIX,
            tooltip="Path in the output folder; a number is appended. Load LoRA offers the files in loras/ after a "
            "refresh (R).",
        ),
    ]
