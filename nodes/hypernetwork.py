"""Loading a hypernetwork and applying it to a model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.errors import HyperAlignError
from ..hyperalign.hosts.comfy import files
from ..hyperalign.hosts.comfy.model import apply, load
from ..hyperalign.hosts.comfy.trace import recorder_for, wanted
from .aliases import aliases
from .choices import check_choices, choice_problem
from .sockets import (
    HyperAlignType,
    merging_input,
    strength_curve_input,
    strength_input,
    trace_output,
    variant_input,
)

TRACE_OUTPUT = 1


class HyperAlignLoader(io.ComfyNode):
    """Loads a file from models/hyperalign."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignLoader",
            display_name="HyperAlign Loader",
            category="HyperAlign",
            **aliases("load hypernetwork", "alignment", "hyperlora", "model loader"),
            description="Loads a HyperAlign hypernetwork from models/hyperalign and shows what it was trained for. A "
            "hypernetwork is a small network that reads the latent being denoised and generates weights for the "
            "diffusion model. Connect it to Apply HyperAlign or HyperAlign Sampler.",
            inputs=[
                io.Combo.Input(
                    "hypernetwork",
                    options=files.file_names(),
                    tooltip="The hypernetwork file (.safetensors in models/hyperalign; files that start with tiny_ are "
                    "included and fit HyperAlign Tiny Model). It must have been trained for your base model.",
                ),
            ],
            outputs=[
                HyperAlignType.Output(
                    display_name="hypernetwork", tooltip="For Apply HyperAlign or HyperAlign Sampler."
                ),
                io.String.Output(
                    display_name="info", tooltip="Base model, variant, sizes and training data, as text."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, hypernetwork: str | None = None) -> bool | str:
        """Checks the file's header before anything runs; the host passes None for a linked input."""
        try:
            if hypernetwork is not None:
                files.check_file(str(hypernetwork))
        except HyperAlignError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, hypernetwork: str | None) -> tuple[float, int]:
        """Makes the host load the file again after it was replaced; the name of a linked input is not known."""
        if hypernetwork is None:
            return 0.0, 0
        status = files.file_path(hypernetwork).stat()
        return status.st_mtime, status.st_size

    @classmethod
    def execute(cls, hypernetwork: str) -> io.NodeOutput:
        """Returns the hypernetwork and its description."""
        loaded = load(files.file_path(str(hypernetwork)))
        info = files.describe(loaded.header)
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
            description="Patches a MODEL with weights that a hypernetwork generates for the image during sampling. Works "
            "with any sampler. A second Apply HyperAlign replaces the first.",
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
                    tooltip="Point in sampling at which HyperAlign starts, as a fraction of the noise range. 0 = from the "
                    "start (pure noise).",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Point in sampling at which HyperAlign ends, as a fraction of the noise range. 1 = to the end; "
                    "must be above start_percent, so 0 is rejected.",
                ),
                variant_input(),
                strength_curve_input(),
                merging_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The aligned model, for any sampler."),
                trace_output(
                    "For HyperAlign Trace, together with the sampled LATENT: recorded while a sampler runs the model. "
                    "Nothing is recorded unless it is connected."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, variant: str | None = None, merging: str | None = None) -> bool | str:
        """Rejects unknown choices before anything runs; the host itself checks numbers."""
        return choice_problem(cls, variant=variant, merging=merging) or True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Makes the host run the node and its samplers again when the trace output gets connected."""
        return wanted(TRACE_OUTPUT)

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
        merging: Any = "auto",
    ) -> io.NodeOutput:
        """Returns the patched clone, and the recorder of its runs or None if trace is not connected."""
        check_choices(cls, variant=variant, merging=merging)
        recorder = recorder_for(TRACE_OUTPUT)
        window = (start_percent, end_percent)
        aligned = apply(model, hypernetwork, strength, *window, variant, strength_curve, recorder, merging)
        return io.NodeOutput(aligned, recorder)
