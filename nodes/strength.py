"""A strength curve over sampling, with a factor per group of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.errors import HyperAlignError
from ..hyperalign.strength import EASES, StrengthCurve, parse_values
from .aliases import aliases
from .choices import check_choices, choice_problem
from .sockets import HyperAlignStrengthType
from .strength_plot import strength_plot

MODES = ["ease", "list"]
SEGMENTS = 64
"""Straight lines that approximate a curve from Curve Editor."""


class HyperAlignStrength(io.ComfyNode):
    """Makes a strength curve and shows it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignStrength",
            display_name="HyperAlign Strength Curve",
            category="HyperAlign",
            description="Changes the strength of HyperAlign during sampling and per group of blocks, and plots the curve. "
            "The curve goes from one strength to another, or through a list of values.",
            **aliases("schedule", "keyframes", "ease", "block weight", "lora block", "fade"),
            is_input_list=True,
            is_output_node=True,
            inputs=[*_curve_inputs(), *_window_inputs(), *_block_inputs(), _list_socket()],
            outputs=[
                HyperAlignStrengthType.Output(
                    display_name="strength_curve",
                    tooltip="For strength_curve of Apply HyperAlign or HyperAlign Sampler; multiplies their strength.",
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        mode: Sequence[str | None] = (None,),
        ease: Sequence[str | None] = (None,),
        values: Sequence[str | None] = (None,),
    ) -> bool | str:
        """Rejects unknown choices and an invalid list before anything runs; a linked input is (None,)."""
        try:
            # The widget may be empty when floats are connected.
            if mode[0] == "list" and values[0] is not None and values[0].strip():
                StrengthCurve(parse_values(values[0]))
        except HyperAlignError as error:
            return str(error)
        return choice_problem(cls, mode=mode, ease=ease) or True

    @classmethod
    def execute(cls, floats: Any = None, **widgets: list[Any]) -> io.NodeOutput:
        """Returns the curve, and shows its plot in the node."""
        check_choices(cls, **widgets)
        first = {name: values[0] for name, values in widgets.items()}
        groups = first["early_blocks"], first["middle_blocks"], first["late_blocks"]
        values, ease = _values(first, floats)
        curve = StrengthCurve(values, ease, first["start_percent"], first["end_percent"], groups)
        return io.NodeOutput(curve, ui=ui.PreviewImage(strength_plot(curve), cls=cls))


def _values(widgets: dict[str, Any], floats: Any) -> tuple[tuple[float, ...], Any]:
    """Returns the curve's values and its ease."""
    if floats is not None:
        return _numbers(floats), "linear"
    if widgets["mode"] == "list":
        return parse_values(widgets["values"]), "linear"
    return (widgets["start_strength"], widgets["end_strength"]), widgets["ease"]


def _numbers(linked: Any) -> tuple[float, ...]:
    """Returns the numbers of a link: some packs send several outputs, others one output that is a list."""
    if isinstance(linked, Real):
        return (float(linked),)
    height_at: Any = getattr(linked, "interp", None)
    if height_at is not None:  # the output of the host's Curve Editor
        return tuple(float(height_at(i / SEGMENTS)) for i in range(SEGMENTS + 1))
    if isinstance(linked, Sequence) and not isinstance(linked, str):
        return tuple(number for item in linked for number in _numbers(item))
    raise HyperAlignError(
        f"floats contains a {type(linked).__name__}; expected numbers. Connect a list of floats or a curve."
    )


def _strength_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=-4.0, max=4.0, step=0.05, tooltip=tooltip)


def _curve_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "mode",
            options=MODES,
            default="ease",
            tooltip="ease = from start_strength to end_strength; list = through the numbers in values.",
        ),
        _strength_input(
            "start_strength",
            1.0,
            "Mode ease: multiplier of strength at start_percent. 1 = as trained; 0 = off; below 0 = the opposite effect.",
        ),
        _strength_input(
            "end_strength", 0.0, "Mode ease: multiplier of strength at end_percent. 1 = as trained; 0 = off."
        ),
        io.Combo.Input(
            "ease",
            options=list(EASES),
            default="linear",
            tooltip="Mode ease: the transition between both strengths. linear = constant rate; ease_in = slow start; "
            "ease_out = slow end; ease_in_out = both.",
        ),
        io.String.Input(
            "values",
            default="1, 1, 0.5, 0",
            tooltip="Mode list: multipliers of strength, separated by commas, evenly spaced from start_percent to "
            "end_percent and linearly interpolated. 1 = as trained; 0 = off.",
        ),
    ]


def _window_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Point in sampling at which the curve starts, as a fraction of the noise range; HyperAlign is off "
            "before it. 0 = from the start (pure noise).",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Point in sampling at which the curve ends, as a fraction of the noise range; HyperAlign is off after "
            "it. 1 = to the end; must be above start_percent, so 0 is rejected.",
        ),
    ]


def _block_inputs() -> list[io.Input]:
    return [
        _strength_input(
            "early_blocks",
            1.0,
            "Multiplier for the early blocks. U-Nets: the down blocks; FLUX: the first half of the double blocks; "
            "SD 3.5: the first third. 1 = the curve unchanged; 0 = off in these blocks.",
        ),
        _strength_input(
            "middle_blocks",
            1.0,
            "Multiplier for the middle blocks. U-Nets: the middle block; FLUX: the second half of the double blocks; "
            "SD 3.5: the second third. 1 = the curve unchanged; 0 = off in these blocks.",
        ),
        _strength_input(
            "late_blocks",
            1.0,
            "Multiplier for the late blocks. U-Nets: the up blocks; FLUX: the single blocks; SD 3.5: the last third. "
            "1 = the curve unchanged; 0 = off in these blocks.",
        ),
    ]


def _list_socket() -> io.Input:
    return io.MultiType.Input(
        "floats",
        types=[io.Float, io.Custom("FLOATS"), io.Custom("CURVE")],
        optional=True,
        tooltip="A list of floats from another node, or a curve from Curve Editor. Replaces mode and its widgets. "
        "0 = off, 1 = as trained.",
    )
