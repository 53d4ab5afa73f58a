"""The plot of one trace: strength by block and step, and how the weights differ from the first ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..hyperalign.trace import Rewards, Trace, block_strengths, generated_at, shown_dynamics
from .drawing import DARK, LIGHT
from .plotting import (
    BLUE,
    FAINT,
    GREEN,
    INSIDE,
    LINE,
    PINK,
    Axis,
    Canvas,
    Colour,
    mixed,
    scale_colour,
    shares_text,
    tick_text,
    ticks,
)

WIDTH, LEFT, RIGHT = 1000, 96, 900
HEAD, GAP, FOOT = 96, 46, 74
MAP_HEIGHT, CHART_HEIGHT = 360, 124
MARKER = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class _Chart:
    title: str
    values_ER: Tensor
    colour: Colour
    reaches: tuple[float, ...] = ()
    """Values that the axis always includes."""
    of_weights: bool = True
    """Whether the values stay constant until weights are generated again."""


def trace_plot(
    trace: Trace, rewards: Rewards | None = None, shares: Mapping[str, float] | None = None
) -> Tensor:
    """Returns the plot of a trace as one image (1, H, W, 3), with the shares of its weights' energy if given."""
    blocks, strengths_EK = block_strengths(trace)
    _, cosines, changes = shown_dynamics(trace)
    charts = [
        _Chart("Cosine similarity to the first weights", cosines, BLUE, (0.98, 1.0)),
        _Chart("Relative change from the first weights", changes, PINK, (0.0, 0.02)),
    ]
    if rewards is not None:
        title = f"Reward score of the predicted image at each evaluation ({rewards.name})"
        charts.append(_Chart(title, rewards.scores_EB, GREEN, of_weights=False))
    row = min(26.0, MAP_HEIGHT / len(blocks))
    bottom = HEAD + row * len(blocks) + len(charts) * (GAP + CHART_HEIGHT)
    plot = _Plot(Canvas(WIDTH, round(bottom + FOOT)), trace)
    plot.heading(shares or {})
    top = plot.heat_map(blocks, strengths_EK, row)
    plot.key_times(HEAD, top)
    for chart in charts:
        top = plot.chart(chart, top + GAP)
    plot.time_axis(top)
    return plot.canvas.finished()


class _Plot:
    def __init__(self, canvas: Canvas, trace: Trace) -> None:
        self.canvas = canvas
        self._trace = trace
        self._count = len(trace.times)
        self._column = (RIGHT - LEFT) / self._count
        self._generated = generated_at(trace)
        self._is_stepped = len(self._generated) < sum(-1 not in used for used in _generations_used(trace))

    def heading(self, shares: Mapping[str, float]) -> None:
        """Writes the variant, the numbers of evaluations, generations and samples, and the shares."""
        trace, samples = self._trace, _sample_count(self._trace)
        times = "once" if len(self._generated) == 1 else f"{len(self._generated)} times"
        name = trace.shown[0].name
        facts = [
            f"variant {trace.variant}",
            f"{self._count} model evaluations",
            f"weights generated {times}",
            f"mean of {samples} samples ({name})" if samples > 1 else f"1 sample ({name})",
        ]
        self.canvas.text((16, 24), "HyperAlign trace", size=20)
        self.canvas.text((192, 25), "  \u00b7  ".join(facts), FAINT, 14)
        self.canvas.text((192, 46), shares_text(shares), FAINT, 13)
        self.canvas.text((LEFT, HEAD - 34), "Strength of the weights in each block", size=14)

    def heat_map(self, blocks: list[str], strengths_EK: Tensor, row: float) -> float:
        """Draws the norm of s dW by block and evaluation; returns the bottom edge."""
        shown = strengths_EK[strengths_EK.isfinite()]
        maximum = max(float(shown.max()) if len(shown) else 0.0, 1e-12)
        bottom = HEAD + row * len(blocks)
        every = math.ceil(14 / row)
        for place, block in enumerate(blocks):
            top = HEAD + row * place
            if place % every == 0:
                self.canvas.text((LEFT - 8, top + row / 2), block, FAINT, 12, "rm")
            for step, strength in enumerate(strengths_EK[:, place].tolist()):
                colour = INSIDE if math.isnan(strength) else scale_colour(strength / maximum)
                left = LEFT + self._column * step
                self.canvas.box((left, top, left + self._column, top + row), colour)
        self._colour_bar(maximum, bottom)
        if len(shown) < strengths_EK.numel():
            self.canvas.box((RIGHT - 60, HEAD - 41, RIGHT - 46, HEAD - 27), INSIDE, LINE)
            self.canvas.text((RIGHT - 40, HEAD - 34), "off", FAINT, 12)
        return bottom

    def chart(self, chart: _Chart, top: float) -> float:
        """Draws the mean over the samples on a band from minimum to maximum; returns the bottom edge."""
        bottom = top + CHART_HEIGHT
        finite = chart.values_ER[chart.values_ER.isfinite()].tolist()
        ends = [*finite, *chart.reaches] or [0.0]
        levels = ticks(min(ends), max(ends))
        y = Axis(levels[0], levels[-1], bottom, top)
        self.canvas.text((LEFT, top - 15), chart.title, size=14)
        self.canvas.box((LEFT, top, RIGHT, bottom), INSIDE)
        for level in levels:
            self.canvas.line([(LEFT, y(level)), (RIGHT, y(level))], LINE, 1)
            self.canvas.text((LEFT - 8, y(level)), tick_text(level, levels[1] - levels[0]), FAINT, 12, "rm")
        for _, x in self._keys():
            self.canvas.dashes((x, top), (x, bottom), MARKER)
        for steps in _segments(chart.values_ER):
            self._segment(chart, steps, y)
        return bottom

    def key_times(self, top: float, bottom: float) -> None:
        """Labels the key times of variant P where they are passed."""
        occupied = -math.inf
        for key, x in self._keys():
            self.canvas.dashes((x, top - 4), (x, bottom), MARKER)
            text = f"key time {key:.2f}" if occupied == -math.inf else f"{key:.2f}"
            if x - 12 > occupied:
                occupied = x + self.canvas.text((x, top - 11), text, LIGHT, 12, "mm") / 2

    def time_axis(self, top: float) -> None:
        """Numbers the evaluations, with their noise levels below."""
        every = max(1, math.ceil(44 / self._column))
        for step in range(0, self._count, every):
            self.canvas.text((self._x(step), top + 14), str(step + 1), LIGHT, 12, "mm")
            self.canvas.text((self._x(step), top + 31), f"{self._trace.times[step]:.2f}", FAINT, 12, "mm")
        self.canvas.text((LEFT - 14, top + 14), "evaluation", LIGHT, 12, "rm")
        self.canvas.text((LEFT - 14, top + 31), "noise u", FAINT, 12, "rm")
        self.canvas.dot((LEFT + 6, top + 56), 4, LIGHT, DARK)
        text = "weights generated here"
        if self._trace.key_times:
            text += "      dashed line: key time of variant P"
        if _sample_count(self._trace) > 1:
            text += "      line: mean of the samples      band: minimum to maximum"
        self.canvas.text((LEFT + 18, top + 56), text, FAINT, 12)

    def _x(self, step: int) -> float:
        return LEFT + self._column * (step + 0.5)

    def _keys(self) -> list[tuple[float, float]]:
        """Returns each key time that is passed, and its x."""
        times = self._trace.times
        passed = [(key, [step for step, u in enumerate(times) if u <= key]) for key in self._trace.key_times]
        return [(key, LEFT + self._column * steps[0]) for key, steps in passed if steps]

    def _segment(self, chart: _Chart, steps: list[int], y: Axis) -> None:
        """Draws consecutive evaluations: as straight lines, or stepped where weights are kept."""
        half = self._column / 2
        offsets = (-half, half) if chart.of_weights and self._is_stepped else (0,)
        places = [(step, self._x(step) + offset) for step in steps for offset in offsets]
        rows = {step: [v for v in chart.values_ER[step].tolist() if not math.isnan(v)] for step in steps}
        if chart.values_ER.shape[1] > 1:
            lower = [(x, y(min(rows[step]))) for step, x in places]
            upper = [(x, y(max(rows[step]))) for step, x in reversed(places)]
            self.canvas.polygon([*lower, *upper], mixed(INSIDE, chart.colour, 0.35))
        means = {step: y(sum(values) / len(values)) for step, values in rows.items()}
        self.canvas.line([(x, means[step]) for step, x in places], chart.colour, 2.5)
        for step in set(steps) & set(self._generated) if chart.of_weights else ():
            radius = min(4.0, self._column / 3)
            self.canvas.dot((self._x(step), means[step]), radius, chart.colour, DARK)

    def _colour_bar(self, maximum: float, bottom: float) -> None:
        left, right, levels = RIGHT + 18, RIGHT + 34, ticks(0.0, maximum, 4)
        y = Axis(0.0, maximum, bottom, HEAD)
        for place in range(100):
            low, high = y(maximum * place / 100), y(maximum * (place + 1) / 100)
            self.canvas.box((left, high, right, low + 0.5), scale_colour(place / 99))
        for level in levels:
            if level <= maximum * 1.001:
                text = tick_text(level, levels[1] - levels[0])
                self.canvas.text((right + 6, y(level)), text, FAINT, 12)
        self.canvas.text((left - 4, HEAD - 14), "norm", FAINT, 12)


def _segments(values_ER: Tensor) -> list[list[int]]:
    """Returns the groups of consecutive evaluations that have a value."""
    found: list[list[int]] = []
    for step in range(len(values_ER)):
        if bool(values_ER[step].isfinite().any()):
            if not found or found[-1][-1] != step - 1:
                found.append([])
            found[-1].append(step)
    return found


def _sample_count(trace: Trace) -> int:
    """Returns the number of samples of the plotted tracks."""
    return sum(track.weights_GRMF.shape[1] for track in trace.shown)


def _generations_used(trace: Trace) -> list[tuple[int, ...]]:
    """Returns the generations whose weights each evaluation used, one of each plotted track."""
    return list(zip(*(track.generation_used for track in trace.shown), strict=True))
