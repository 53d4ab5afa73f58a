"""The image of one trace: strength by block and step, and how the weights move away from the first ones."""

from __future__ import annotations

import math
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
    tick_text,
    ticks,
)

WIDTH, LEFT, RIGHT = 1000, 96, 900
HEAD, GAP, FOOT = 96, 46, 74
MAP_HEIGHT, CHART_HEIGHT = 360, 124
MARK = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class _Chart:
    title: str
    values_ER: Tensor
    colour: Colour
    reaches: tuple[float, ...] = ()
    """Values that the axis reaches whatever there is to draw."""
    of_weights: bool = True
    """Whether it stays as it is until weights are generated anew."""


def trace_image(trace: Trace, rewards: Rewards | None = None) -> Tensor:
    """Returns a trace as one image (1, H, W, 3)."""
    blocks, strengths_EK = block_strengths(trace)
    _, cosines, changes = shown_dynamics(trace)
    charts = [
        _Chart("Cosine similarity of the weights with the first ones", cosines, BLUE, (0.98, 1.0)),
        _Chart("Relative change of the weights against the first ones", changes, PINK, (0.0, 0.02)),
    ]
    if rewards is not None:
        title = f"Reward of the image foreseen at each evaluation ({rewards.name})"
        charts.append(_Chart(title, rewards.scores_EB, GREEN, of_weights=False))
    row = min(26.0, MAP_HEIGHT / len(blocks))
    bottom = HEAD + row * len(blocks) + len(charts) * (GAP + CHART_HEIGHT)
    drawing = _Drawing(Canvas(WIDTH, round(bottom + FOOT)), trace)
    drawing.heading()
    top = drawing.heat_map(blocks, strengths_EK, row)
    drawing.key_times(HEAD, top)
    for chart in charts:
        top = drawing.chart(chart, top + GAP)
    drawing.time_axis(top)
    return drawing.canvas.finished()


class _Drawing:
    def __init__(self, canvas: Canvas, trace: Trace) -> None:
        self.canvas = canvas
        self._trace = trace
        self._count = len(trace.times)
        self._column = (RIGHT - LEFT) / self._count
        self._written = generated_at(trace)
        self._stays = len(self._written) < sum(-1 not in at for at in _served(trace))

    def heading(self) -> None:
        """Writes what was traced."""
        trace, rows = self._trace, sum(track.weights_GRMF.shape[1] for track in self._trace.shown)
        times = "once" if len(self._written) == 1 else f"{len(self._written)} times"
        facts = [
            f"variant {trace.variant}",
            f"{self._count} model evaluations",
            f"weights generated {times}",
            f"mean of {rows} {trace.shown[0].name} rows" if rows > 1 else f"1 {trace.shown[0].name} row",
        ]
        self.canvas.text((16, 24), "HyperAlign trace", size=20)
        self.canvas.text((192, 25), "  \u00b7  ".join(facts), FAINT, 14)
        self.canvas.text((LEFT, HEAD - 34), "Strength of the weights in each block", size=14)

    def heat_map(self, blocks: list[str], strengths_EK: Tensor, row: float) -> float:
        """Draws the length of s dW by block and evaluation; returns its bottom."""
        shown = strengths_EK[strengths_EK.isfinite()]
        greatest = max(float(shown.max()) if len(shown) else 0.0, 1e-12)
        bottom = HEAD + row * len(blocks)
        every = math.ceil(14 / row)
        for place, block in enumerate(blocks):
            top = HEAD + row * place
            if place % every == 0:
                self.canvas.text((LEFT - 8, top + row / 2), block, FAINT, 12, "rm")
            for step, strength in enumerate(strengths_EK[:, place].tolist()):
                colour = INSIDE if math.isnan(strength) else scale_colour(strength / greatest)
                left = LEFT + self._column * step
                self.canvas.box((left, top, left + self._column, top + row), colour)
        self._colour_bar(greatest, bottom)
        if len(shown) < strengths_EK.numel():
            self.canvas.box((RIGHT - 60, HEAD - 41, RIGHT - 46, HEAD - 27), INSIDE, LINE)
            self.canvas.text((RIGHT - 40, HEAD - 34), "off", FAINT, 12)
        return bottom

    def chart(self, chart: _Chart, top: float) -> float:
        """Draws the mean over the rows and, behind it, from the least to the greatest; returns its bottom."""
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
            self.canvas.dashes((x, top), (x, bottom), MARK)
        stairs = chart.of_weights and self._stays
        for steps in _stretches(chart.values_ER):
            self._stretch(chart, steps, y, stairs)
        return bottom

    def key_times(self, top: float, bottom: float) -> None:
        """Names the key times of P where they are passed."""
        taken = -math.inf
        for key, x in self._keys():
            self.canvas.dashes((x, top - 4), (x, bottom), MARK)
            text = f"key time {key:.2f}" if taken == -math.inf else f"{key:.2f}"
            if x - 12 > taken:
                taken = x + self.canvas.text((x, top - 11), text, LIGHT, 12, "mm") / 2

    def time_axis(self, top: float) -> None:
        """Numbers the evaluations and writes their noise levels below."""
        every = max(1, math.ceil(44 / self._column))
        for step in range(0, self._count, every):
            self.canvas.text((self._x(step), top + 14), str(step + 1), LIGHT, 12, "mm")
            self.canvas.text((self._x(step), top + 31), f"{self._trace.times[step]:.2f}", FAINT, 12, "mm")
        self.canvas.text((LEFT - 14, top + 14), "evaluation", LIGHT, 12, "rm")
        self.canvas.text((LEFT - 14, top + 31), "noise u", FAINT, 12, "rm")
        self.canvas.dot((LEFT + 6, top + 56), 4, LIGHT, DARK)
        text = "weights generated here"
        if self._trace.key_times:
            text += "      dashed: key times of variant P"
        if sum(track.weights_GRMF.shape[1] for track in self._trace.shown) > 1:
            text += "      line: mean of the rows, from the least to the greatest behind it"
        self.canvas.text((LEFT + 18, top + 56), text, FAINT, 12)

    def _x(self, step: int) -> float:
        return LEFT + self._column * (step + 0.5)

    def _keys(self) -> list[tuple[float, float]]:
        """Returns each key time that is passed, and where."""
        times = self._trace.times
        passed = [(key, [step for step, u in enumerate(times) if u <= key]) for key in self._trace.key_times]
        return [(key, LEFT + self._column * steps[0]) for key, steps in passed if steps]

    def _stretch(self, chart: _Chart, steps: list[int], y: Axis, stairs: bool) -> None:
        """Draws consecutive evaluations: straight from one to the next, or as stairs."""
        half = self._column / 2
        places = [
            (step, self._x(step) + side) for step in steps for side in ((-half, half) if stairs else (0,))
        ]
        rows = {step: [v for v in chart.values_ER[step].tolist() if not math.isnan(v)] for step in steps}
        if chart.values_ER.shape[1] > 1:
            lower = [(x, y(min(rows[step]))) for step, x in places]
            upper = [(x, y(max(rows[step]))) for step, x in reversed(places)]
            self.canvas.polygon([*lower, *upper], mixed(INSIDE, chart.colour, 0.35))
        means = {step: y(sum(values) / len(values)) for step, values in rows.items()}
        self.canvas.line([(x, means[step]) for step, x in places], chart.colour, 2.5)
        for step in set(steps) & set(self._written) if chart.of_weights else ():
            radius = min(4.0, self._column / 3)
            self.canvas.dot((self._x(step), means[step]), radius, chart.colour, DARK)

    def _colour_bar(self, greatest: float, bottom: float) -> None:
        left, right, levels = RIGHT + 18, RIGHT + 34, ticks(0.0, greatest, 4)
        y = Axis(0.0, greatest, bottom, HEAD)
        for place in range(100):
            low, high = y(greatest * place / 100), y(greatest * (place + 1) / 100)
            self.canvas.box((left, high, right, low + 0.5), scale_colour(place / 99))
        for level in levels:
            if level <= greatest * 1.001:
                text = tick_text(level, levels[1] - levels[0])
                self.canvas.text((right + 6, y(level)), text, FAINT, 12)
        self.canvas.text((left - 4, HEAD - 14), "length", FAINT, 12)


def _stretches(values_ER: Tensor) -> list[list[int]]:
    """Returns the runs of consecutive evaluations that have a value."""
    found: list[list[int]] = []
    for step in range(len(values_ER)):
        if bool(values_ER[step].isfinite().any()):
            if not found or found[-1][-1] != step - 1:
                found.append([])
            found[-1].append(step)
    return found


def _served(trace: Trace) -> list[tuple[int, ...]]:
    """Returns the generations that served each evaluation, one of each shown track."""
    return list(zip(*(track.generation_used for track in trace.shown), strict=True))
