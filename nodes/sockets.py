"""The pack's own socket types, and inputs shared by several nodes."""

from __future__ import annotations

from comfy_api.latest import io

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


def prompt_input() -> io.String.Input:
    """Returns the widget for the prompts that images are scored against."""
    return io.String.Input(
        "prompt",
        multiline=True,
        default="a red heart",
        tooltip="One line = the prompt of all images; or one line per image, in the same order. "
        "Empty = scored against the empty prompt.",
    )


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
