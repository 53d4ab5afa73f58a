"""A curve of strengths over the run and over the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from comfy_api.latest import io, ui

from ..hyperalign.errors import HyperAlignError
from ..hyperalign.strength import EASES, StrengthCurve, parse_values
from .aliases import aliases
from .choices import choice_problem
from .sockets import HyperAlignStrengthType
from .strength_image import image

MODES = ["ease", "list"]
DRAWN = 64
"""Stretches of a hand-drawn curve, straight lines all of them."""


class HyperAlignStrength(io.ComfyNode):
    """Makes a strength curve and shows it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declares the node."""
        return io.Schema(
            node_id="HyperAlignStrength",
            display_name="HyperAlign Strength Curve",
            category="HyperAlign",
            description="Lets HyperAlign act more or less strongly over the run and in different blocks of the model, "
            "and shows the curve. From one strength to another, or through a list of numbers.",
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
        cls, mode: Sequence[str] = ("ease",), ease: Sequence[str] = ("linear",), values: Sequence[str] = ("",)
    ) -> bool | str:
        """Refuses unknown choices and a bad list before anything runs."""
        try:
            # An empty list may be left behind where one is connected.
            if mode[0] == "list" and values[0].strip():
                StrengthCurve(parse_values(values[0]))
        except HyperAlignError as error:
            return str(error)
        return choice_problem(cls, mode=list(mode), ease=list(ease)) or True

    @classmethod
    def execute(cls, floats: Any = None, **widgets: list[Any]) -> io.NodeOutput:
        """Returns the curve, and shows it in the node."""
        first = {name: values[0] for name, values in widgets.items()}
        groups = first["early_blocks"], first["middle_blocks"], first["late_blocks"]
        values, ease = _values(first, floats)
        curve = StrengthCurve(values, ease, first["start_percent"], first["end_percent"], groups)
        return io.NodeOutput(curve, ui=ui.PreviewImage(image(curve), cls=cls))


def _values(widgets: dict[str, Any], floats: Any) -> tuple[tuple[float, ...], Any]:
    """Returns the curve's values and how they are eased."""
    if floats is not None:
        return _numbers(floats), "linear"
    if widgets["mode"] == "list":
        return parse_values(widgets["values"]), "linear"
    return (widgets["start_strength"], widgets["end_strength"]), widgets["ease"]


def _numbers(linked: Any) -> tuple[float, ...]:
    """Returns the numbers of a link: some packs send a list of outputs, some one output that is a list."""
    if isinstance(linked, Real):
        return (float(linked),)
    height_at: Any = getattr(linked, "interp", None)
    if height_at is not None:  # what the host's Curve Editor makes
        return tuple(float(height_at(i / DRAWN)) for i in range(DRAWN + 1))
    if isinstance(linked, Sequence) and not isinstance(linked, str):
        return tuple(number for item in linked for number in _numbers(item))
    raise HyperAlignError(
        f"floats holds a {type(linked).__name__}; expected numbers. Connect a list of floats or a curve."
    )


def _strength_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=-4.0, max=4.0, step=0.05, tooltip=tooltip)


def _curve_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "mode",
            options=MODES,
            default="ease",
            tooltip="ease = from start_strength to end_strength; list = through the numbers of values.",
        ),
        _strength_input(
            "start_strength",
            1.0,
            "Mode ease: factor on the strength at start_percent. 1 = as trained; 0 = off; below 0 pushes the other way.",
        ),
        _strength_input(
            "end_strength", 0.0, "Mode ease: factor on the strength at end_percent. 1 = as trained; 0 = off."
        ),
        io.Combo.Input(
            "ease",
            options=list(EASES),
            default="linear",
            tooltip="Mode ease: how it gets there. linear = evenly; ease_in = slowly at first; ease_out = slowly at "
            "last; ease_in_out = both.",
        ),
        io.String.Input(
            "values",
            default="1, 1, 0.5, 0",
            tooltip="Mode list: factors on the strength with commas between, spread evenly from start_percent to "
            "end_percent with straight lines between them. 1 = as trained; 0 = off.",
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
            tooltip="Where in the run the curve begins, as a fraction of the noise range; before it HyperAlign is off. "
            "0 = from pure noise on.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Where in the run the curve ends, as a fraction of the noise range; after it HyperAlign is off. "
            "1 = acts to the end; must lie above start_percent, so 0 is refused.",
        ),
    ]


def _block_inputs() -> list[io.Input]:
    return [
        _strength_input(
            "early_blocks",
            1.0,
            "Factor on the early blocks. U-Nets: the down blocks; FLUX: the first half of the double blocks; "
            "SD 3.5: the first third. 1 = the curve itself; 0 = off there.",
        ),
        _strength_input(
            "middle_blocks",
            1.0,
            "Factor on the middle blocks. U-Nets: the middle block; FLUX: the second half of the double blocks; "
            "SD 3.5: the second third. 1 = the curve itself; 0 = off there.",
        ),
        _strength_input(
            "late_blocks",
            1.0,
            "Factor on the late blocks. U-Nets: the up blocks; FLUX: the single blocks; SD 3.5: the last third. "
            "1 = the curve itself; 0 = off there.",
        ),
    ]


def _list_socket() -> io.Input:
    return io.MultiType.Input(
        "floats",
        types=[io.Float, io.Custom("FLOATS"), io.Custom("CURVE")],
        optional=True,
        tooltip="A list of floats from another node, or the curve of Curve Editor. It takes the place of mode and what "
        "belongs to it. 0 = off, 1 = as trained.",
    )
