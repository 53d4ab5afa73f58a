"""The embedded tiny model and its empty latents."""

from __future__ import annotations

from comfy_api.latest import io

from ..hyperalign.hosts.comfy.tiny import empty_latents, load_tiny
from .aliases import aliases


class HyperAlignTinyModel(io.ComfyNode):
    """Loads the text-to-image model included in the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignTinyModel",
            display_name="HyperAlign Tiny Model",
            category="HyperAlign",
            **aliases("demo model", "test model", "emoji", "checkpoint loader"),
            description="A small text-to-image model for 64x64 emoji scenes, to try HyperAlign in seconds. Use it with CLIP "
            "Text Encode, KSampler and VAE Decode like any other model.",
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The diffusion model, for Apply HyperAlign or KSampler."
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="The text encoder, with a vocabulary of about 80 words."
                ),
                io.Vae.Output(display_name="vae", tooltip="The VAE, with 4 pixels per latent."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Returns the three parts."""
        return io.NodeOutput(*load_tiny())


class HyperAlignTinyLatent(io.ComfyNode):
    """Creates empty latents of the tiny model's size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignTinyLatent",
            display_name="HyperAlign Tiny Empty Latent",
            category="HyperAlign",
            **aliases("empty latent image", "new latent", "64x64"),
            description="Empty latents for HyperAlign Tiny Model, for images of 64x64 pixels. Empty Latent Image does not fit: "
            "it assumes 8 pixels per latent, this model has 4.",
            inputs=[
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="Number of images in the batch. 0 is rejected.",
                )
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For KSampler or HyperAlign Sampler.")],
        )

    @classmethod
    def execute(cls, batch_size: int) -> io.NodeOutput:
        """Returns zeros (B, 4, 16, 16)."""
        return io.NodeOutput({"samples": empty_latents(batch_size)})
