"""The pack's own socket types, and inputs shared by several nodes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hyperalign.errors import HyperAlignError
from ..hyperalign.hosts.merging import MERGINGS
from ..hyperalign.prompts import LINES

HyperAlignType = io.Custom("HYPERALIGN")
RewardType = io.Custom("HYPERALIGN_REWARD")
HyperAlignStrengthType = io.Custom("HYPERALIGN_STRENGTH")
HyperAlignTraceType = io.Custom("HYPERALIGN_TRACE")
VARIANTS = ["auto", "S", "P", "I"]


def strength_input() -> io.Float.Input:
    """Returns the strength widget."""
    return io.Float.Input(
        "strength",
        default=1.0,
        min=-4.0,
        max=4.0,
        step=0.05,
        tooltip="Scale of the generated weights. 1 = as trained; 0 = off, bit-identical to the model without "
        "HyperAlign; below 0 = the opposite effect.",
    )


def strength_curve_input() -> io.Input:
    """Returns the strength curve socket."""
    return HyperAlignStrengthType.Input(
        "strength_curve",
        optional=True,
        tooltip="From HyperAlign Strength Curve: multiplies strength during sampling and per block. Not connected = "
        "constant strength; where the curve is 0, HyperAlign is off.",
    )


def variant_input() -> io.Combo.Input:
    """Returns the variant widget."""
    return io.Combo.Input(
        "variant",
        options=VARIANTS,
        default="auto",
        tooltip="When weights are generated. S = at every model evaluation; P = at a few key times stored in the "
        "hypernetwork; I = once, at the start (fastest); auto = the variant that the hypernetwork was trained for.",
    )


def merging_input() -> io.Combo.Input:
    """Returns the widget for the way in which weights reach the model."""
    return io.Combo.Input(
        "merging",
        options=list(MERGINGS),
        default="auto",
        optional=True,
        tooltip="How the generated weights reach the model. merged = as a copy of its attention weights for each image: as "
        "fast as the model alone, needs memory; additive = added to the layers' outputs: slower on fast GPUs, needs "
        "none; auto = merged where it fits and pays (ComfyUI's log says which, and why).",
    )


def prompt_input() -> io.String.Input:
    """Returns the widget for the prompts that images are scored against."""
    return io.String.Input(
        "prompt",
        multiline=True,
        default="a red heart",
        tooltip="The prompt of all images, which may have several lines; or one line per image, see lines. A connected "
        "list of texts is one for each image. Empty = scored against the empty prompt.",
    )


def lines_input() -> io.Combo.Input:
    """Returns the widget that says what the lines of a prompt are."""
    return io.Combo.Input(
        "lines",
        options=list(LINES),
        default=LINES[0],
        optional=True,
        tooltip="What the lines of prompt are. one prompt = all of them are the prompt of every image; one per image = "
        "each line is the prompt of one image, in the same order, and a single line that of all.",
    )


def only(**values: Any) -> list[Any]:
    """Returns the values of a node that takes lists: of each list, its only element.

    Raises HyperAlignError for a list of several.
    """
    for name, value in values.items():
        if isinstance(value, list) and len(value) != 1:
            raise HyperAlignError(
                f"{name} has received a list of {len(value)}; expected one. Connect a single value, or use one node for each."
            )
    return [value[0] if isinstance(value, list) else value for value in values.values()]


def trace_output(tooltip: str) -> io.Output:
    """Returns the trace output."""
    return HyperAlignTraceType.Output(display_name="trace", tooltip=tooltip)


def conditioning_inputs() -> list[io.Input]:
    """Returns the conditioning sockets of a sampler."""
    return [
        io.Conditioning.Input("positive", tooltip="Conditioning of the prompt, from CLIP Text Encode."),
        io.Conditioning.Input(
            "negative",
            tooltip="Conditioning of the negative prompt, from CLIP Text Encode; not used at cfg 1.",
        ),
    ]


def seed_input(tooltip: str) -> io.Int.Input:
    """Returns the seed widget, with the same range as KSampler's."""
    return io.Int.Input(
        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip
    )


def threshold_input(tooltip: str) -> io.Float.Input:
    """Returns a score threshold widget; its range fits every reward."""
    return io.Float.Input(
        "threshold", default=0.0, min=-1000.0, max=1000.0, step=0.001, round=0.0001, tooltip=tooltip
    )
