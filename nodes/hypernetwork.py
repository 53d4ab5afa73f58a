"""Loading a hypernetwork and applying it to a model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.errors import HyperAlignError
from ..hyperalign.hosts.comfy import files as comfy_files
from ..hyperalign.hosts.comfy import model as comfy
from ..hyperalign.hosts.comfy import trace as comfy_trace
from .aliases import aliases
from .choices import choice_problem
from .sockets import HyperAlignType, strength_curve_input, strength_input, trace_output, variant_input

TRACE_OUTPUT = 1


class HyperAlignLoader(io.ComfyNode):
    """Loads a file of models/hyperalign."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignLoader",
            display_name="HyperAlign Loader",
            category="HyperAlign",
            **aliases("load hypernetwork", "alignment", "hyperlora", "model loader"),
            description="Loads a HyperAlign hypernetwork from models/hyperalign and shows what it was trained for. A "
            "hypernetwork is a small network that looks at the image in the making and generates weights into the "
            "diffusion model; connect it to Apply HyperAlign or HyperAlign Sampler.",
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
    def validate_inputs(cls, hypernetwork: str = "") -> bool | str:
        """Reads the header before anything runs; the host leaves out a linked input's value."""
        try:
            if hypernetwork != "":
                comfy_files.check_file(str(hypernetwork))
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
            **aliases("hypernetwork", "align model", "human preference", "prompt adherence", "lora"),
            description="Makes a MODEL sample with weights that a hypernetwork writes for the image in the making. "
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
                strength_curve_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The aligned model, for any sampler."),
                trace_output(
                    "For HyperAlign Trace, together with the sampled LATENT: filled while a sampler runs the model. "
                    "Costs nothing while it is not connected."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, variant: str = "auto") -> bool | str:
        """Refuses an unknown variant before anything runs; the host itself checks the numbers."""
        return choice_problem(cls, variant=variant) or True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Makes the host run it again, and the samplers behind it, once somebody wants the trace."""
        return comfy_trace.wanted(TRACE_OUTPUT)

    @classmethod
    def execute(
        cls,
        model: Any,
        hypernetwork: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        variant: Any,
        strength_curve: Any = None,
    ) -> io.NodeOutput:
        """Returns the patched clone and the recorder of its runs, None where nobody wants it."""
        recorder = comfy_trace.recorder_for(TRACE_OUTPUT)
        aligned = comfy.apply(
            model, hypernetwork, strength, start_percent, end_percent, variant, strength_curve, recorder
        )
        return io.NodeOutput(aligned, recorder)
