"""The pack's own socket types, and inputs that several nodes share."""

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
        tooltip="How strongly the generated weights act, as a factor. 1 = as trained; 0 = off, the image of the "
        "model without HyperAlign, bit for bit; below 0 pushes the other way.",
    )


def strength_curve_input() -> io.Input:
    """Returns the socket for a strength curve."""
    return HyperAlignStrengthType.Input(
        "strength_curve",
        optional=True,
        tooltip="From HyperAlign Strength Curve: multiplies strength over the run and by block. Nothing connected = "
        "the same strength throughout; 0 = off while the curve is there.",
    )


def variant_input() -> io.Combo.Input:
    """Returns the variant widget."""
    return io.Combo.Input(
        "variant",
        options=VARIANTS,
        default="auto",
        tooltip="When weights are generated anew. S = at every model evaluation; P = at a few key times stored in "
        "the hypernetwork; I = once, at the start (fastest); auto = as the hypernetwork was trained.",
    )


def prompt_input() -> io.String.Input:
    """Returns the widget with the prompts that images are judged against."""
    return io.String.Input(
        "prompt",
        multiline=True,
        default="a red heart",
        tooltip="One line = the prompt of all images; or one line per image, in their order. "
        "0 lines = judged against the empty prompt.",
    )


def trace_output(tooltip: str) -> io.Output:
    """Returns the socket of a trace."""
    return HyperAlignTraceType.Output(display_name="trace", tooltip=tooltip)


def conditioning_inputs() -> list[io.Input]:
    """Returns the sockets for both prompts of a sampler."""
    return [
        io.Conditioning.Input("positive", tooltip="What the image should show, from CLIP Text Encode."),
        io.Conditioning.Input(
            "negative", tooltip="What it should not show, from CLIP Text Encode; unused at cfg 1."
        ),
    ]


def seed_input(tooltip: str) -> io.Int.Input:
    """Returns the seed widget, as KSampler has it."""
    return io.Int.Input(
        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip
    )


def threshold_input(tooltip: str) -> io.Float.Input:
    """Returns a widget for a score of any reward."""
    return io.Float.Input(
        "threshold", default=0.0, min=-1000.0, max=1000.0, step=0.001, round=0.0001, tooltip=tooltip
    )
