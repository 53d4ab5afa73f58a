"""Writing what a hypernetwork generates into a file for any LoRA loader."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.hosts.comfy import export as comfy_export
from .aliases import aliases
from .sockets import HyperAlignType, seed_input, strength_input


class HyperAlignExportLora(io.ComfyNode):
    """Saves the weights of one prompt, seed and time as a plain LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignExportLora",
            display_name="Export HyperAlign as LoRA",
            category="HyperAlign",
            **aliases("save lora", "extract lora", "bake", "hypernetwork to lora"),
            description="Saves the weights a hypernetwork writes for one prompt, seed and time as a plain LoRA in "
            "output/loras, for Load LoRA here or for diffusers. The LoRA no longer follows the image in the making.",
            is_output_node=True,
            inputs=_inputs(),
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
        )

    @classmethod
    def execute(
        cls, model: Any, hypernetwork: Any, positive: Any, latent_image: Any, **settings: Any
    ) -> io.NodeOutput:
        """Writes the file and returns its path."""
        workflow = comfy_export.workflow_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        path = comfy_export.export_lora(
            model, hypernetwork, positive, latent_image, metadata=workflow, **settings
        )
        return io.NodeOutput(str(path), ui=ui.PreviewText(str(path)))


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input(
            "model", tooltip="The base model the hypernetwork was trained for. It is not changed."
        ),
        HyperAlignType.Input("hypernetwork", tooltip="From HyperAlign Loader."),
        io.Conditioning.Input(
            "positive", tooltip="The one prompt the LoRA is made for, from CLIP Text Encode."
        ),
        io.Latent.Input(
            "latent_image",
            tooltip="At time 1 an empty latent of the image's size; below 1 a finished image (from KSampler or "
            "VAE Encode), which is noised to that time. Of a batch, the first image.",
        ),
        seed_input(
            "Number that decides the noise the hypernetwork looks at, as in KSampler. 0 is a seed like any."
        ),
        io.Float.Input(
            "time",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="When the hypernetwork looks, as a fraction of the noise. 1 = at pure noise, what variant I uses for "
            "the whole run; 0 = at the finished image. It counts down, against start_percent of Apply HyperAlign.",
        ),
        strength_input(),
        io.String.Input(
            "filename_prefix",
            default=comfy_export.DEFAULT_PREFIX,
            tooltip="Path below the output folder, completed by a number. What lies in loras/ is offered by Load LoRA "
            "after a refresh (R).",
        ),
    ]
