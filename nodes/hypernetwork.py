"""Loading a hypernetwork and applying it to a model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.errors import HyperAlignError
from ..hyperalign.hosts import comfy, comfy_files
from .sockets import HyperAlignType, strength_input, variant_input


class HyperAlignLoader(io.ComfyNode):
    """Loads a file of models/hyperalign."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignLoader",
            display_name="HyperAlign Loader",
            category="HyperAlign",
            description="Loads a HyperAlign hypernetwork from models/hyperalign and shows what it was trained for.",
            inputs=[
                io.Combo.Input(
                    "hypernetwork",
                    options=comfy_files.file_names(),
                    tooltip="The hypernetwork file (.safetensors in models/hyperalign; the tiny_ ones come with the "
                    "pack and fit HyperAlign Tiny Model). It must have been trained for your base model.",
                ),
            ],
            outputs=[
                HyperAlignType.Output(
                    display_name="hypernetwork", tooltip="For Apply HyperAlign or HyperAlign Sampler."
                ),
                io.String.Output(
                    display_name="info", tooltip="Base model, variant, sizes and training, as text."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, hypernetwork: str | None = None) -> bool | str:
        """Reads the header before anything runs; the host leaves out a linked input's value."""
        try:
            if hypernetwork is not None:
                comfy_files.check_file(hypernetwork)
        except HyperAlignError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, hypernetwork: str) -> tuple[float, int]:
        """Makes the host load a file again once it was replaced."""
        status = comfy_files.file_path(hypernetwork).stat()
        return status.st_mtime, status.st_size

    @classmethod
    def execute(cls, hypernetwork: str) -> io.NodeOutput:
        """Returns the hypernetwork and its description."""
        loaded = comfy.load(comfy_files.file_path(hypernetwork))
        info = comfy_files.describe(loaded.header)
        return io.NodeOutput(loaded, info, ui=ui.PreviewText(info))


class HyperAlignApply(io.ComfyNode):
    """Patches a MODEL; works with any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignApply",
            display_name="Apply HyperAlign",
            category="HyperAlign",
            description="Makes a MODEL sample with weights that a hypernetwork writes for the picture in the making. "
            "Works with any sampler; a second one replaces the first.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The base model the hypernetwork was trained for. It is not changed."
                ),
                HyperAlignType.Input("hypernetwork", tooltip="From HyperAlign Loader."),
                strength_input(),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the run it begins to act, as a fraction of the noise range. 0 = from pure noise on.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the run it stops acting, as a fraction of the noise range. 1 = acts to the end; "
                    "must lie above start_percent, so 0 is refused.",
                ),
                variant_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The aligned model, for any sampler.")],
        )

    @classmethod
    def validate_inputs(cls, strength: float = 1.0) -> bool | str:
        """Refuses a strength that is no number before anything runs."""
        return comfy.strength_problem(strength) or True

    @classmethod
    def execute(
        cls,
        model: Any,
        hypernetwork: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        variant: Any,
    ) -> io.NodeOutput:
        """Returns the patched clone."""
        return io.NodeOutput(comfy.apply(model, hypernetwork, strength, start_percent, end_percent, variant))
