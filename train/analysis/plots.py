"""Draws the figures of `weights` and `diversity` as PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hyperalign.conditioning import percent
from hyperalign.files import replacing
from hyperalign.trace_energy import PARTS
from train.analysis.diversity import Diversity
from train.analysis.statistics import Band
from train.analysis.weights import Division, Dynamics, Variation

COLUMNS = 3
COLOURS = {"same": "#4c78a8", "prompt": "#f58518", "time": "#54a24b", "interaction": "#b8b0ac"}
NAMES = {
    "same": "same for all", "prompt": "by prompt", "time": "by time", "interaction": "prompt x time",
}  # fmt: skip
SMALLEST_RANGES = {"cosine": (0.98, 1.002), "change": (0.0, 0.02)}
"""What the axes of dynamics always include, so that rounding errors do not fill them."""
CELL, LEAST_WIDTH = 1.25, 7.5
"""Inches of an image, and of a figure of images with its title."""
LETTERS = 11
"""Letters of a prompt that an inch takes."""
NAME_LETTERS = 14
"""Letters of a method's name in a line."""


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG whole or not at all. Raises OSError."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def plot_dynamics(found: Dynamics, title: str) -> Figure:
    """Returns Figure 8: mean and 5 to 95 % band over the prompts, by step."""
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    figure.suptitle(title)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _curve(upper, found, found.cosine, SMALLEST_RANGES["cosine"], "tab:blue")
    upper.set_ylabel("cosine similarity\nto the weights of step 1")
    _curve(lower, found, found.relative_change, SMALLEST_RANGES["change"], "tab:red")
    lower.set_ylabel("relative change\nfrom the weights of step 1")
    lower.set_xlabel("sampling step")
    lower.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    _noise_levels(upper, found.times)
    upper.legend(loc="best", fontsize="small")
    return figure


def _curve(axes: Axes, found: Dynamics, values: Band, reach: tuple[float, float], colour: str) -> None:
    steps, kept = range(1, len(found.times) + 1), len(found.generated_at) < len(found.times)
    low, mean, high = values.low.tolist(), values.mean.tolist(), values.high.tolist()
    axes.fill_between(
        steps, low, high, step="mid" if kept else None, color=colour, alpha=0.2, linewidth=0,
        label="5 to 95 % of the prompts",
    )  # fmt: skip
    style = "steps-mid" if kept else "default"
    axes.plot(steps, mean, drawstyle=style, color=colour, label="mean of the prompts")
    axes.plot(
        [place + 1 for place in found.generated_at], [mean[place] for place in found.generated_at], "o",
        color=colour, markersize=4, label="weights generated",
    )  # fmt: skip
    ends = [*low, *high, *reach]
    margin = 0.04 * (max(ends) - min(ends))
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.grid(alpha=0.3)


def _noise_levels(axes: Axes, times: Sequence[float]) -> None:
    """Names the noise level of some steps above the axes."""
    top = axes.secondary_xaxis("top")
    every = max(1, round(len(times) / 8))
    places = range(0, len(times), every)
    top.set_xticks([place + 1 for place in places], [f"{times[place]:.2f}" for place in places])
    top.set_xlabel("timestep u (1 is noise, 0 the image)")


def plot_variation(found: Variation, title: str) -> Figure:
    """Returns Figure 9: a panel per step with a point per prompt, all in one plane."""
    shown = found.shown
    panels = len(shown.evaluations)
    columns, rows = min(COLUMNS, panels), -(-panels // COLUMNS)
    figure = Figure(figsize=(max(7.0, 3.3 * columns + 0.6), 3.3 * rows + 1.2), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    colours = shown.places_SN2[0, :, 0].tolist()
    across_reach, up_reach = (1.08 * shown.places_SN2.abs().amax(dim=(0, 1))).tolist()
    spreads = dict(zip(found.generated_at, found.spread_G.tolist(), strict=True))
    for panel, axes in enumerate(grid):
        axes.set_visible(panel < panels)
        if panel < panels:
            step, u = shown.evaluations[panel], shown.times[panel]
            across, up = shown.places_SN2[panel].T.tolist()
            axes.axhline(0, color="0.85", linewidth=0.8)
            axes.axvline(0, color="0.85", linewidth=0.8)
            axes.scatter(across, up, c=colours, cmap="viridis", s=14, alpha=0.8, linewidths=0)
            axes.set_title(f"step {step + 1}, u {u:.2f}, spread {spreads[step]:.3f}", fontsize="medium")
            axes.set_xlim(-across_reach or -1.0, across_reach or 1.0)
            axes.set_ylim(-up_reach or -1.0, up_reach or 1.0)
    first, second = shown.explained
    figure.supxlabel(
        f"PC 1, {first:.1%} of the variance (colour: place on PC 1 at step {shown.evaluations[0] + 1})"
    )
    figure.supylabel(f"PC 2, {second:.1%} of the variance")
    return figure


def plot_division(found: Division, title: str) -> Figure:
    """Returns the shares of energy of all layers and of each block, and where the energy is."""
    names = ["all", *found.blocks]
    places = [0.0, *(1.6 + index for index in range(len(found.blocks)))]
    every = [found.shares_4.tolist(), *found.block_shares_K4.tolist()]
    figure = Figure(figsize=(max(8.0, 0.42 * len(names) + 2.0), 6.6), layout="constrained")
    figure.suptitle(title)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1.0))
    bottoms = [0.0] * len(names)
    for index, part in enumerate(PARTS):
        heights = [row[index] for row in every]
        error = 100 * float(found.error_4[index])
        label = f"{NAMES[part]}: {100 * every[0][index]:.1f} \u00b1 {error:.1f} %"
        upper.bar(places, heights, bottom=bottoms, width=0.8, color=COLOURS[part], label=label)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    upper.set_ylabel("share of the energy |\u0394W|\u00b2")
    upper.set_ylim(0, 1)
    upper.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize="small",
        title="all layers, \u00b1 standard error over the prompts", title_fontsize="small",
    )  # fmt: skip
    lower.bar(places[1:], found.block_energy_K.tolist(), width=0.8, color="0.5")
    lower.set_ylabel("block's share\nof all energy")
    lower.set_xticks(places, names, rotation=90 if len(names) > 10 else 0)
    return figure


def plot_conditioning(found: Mapping[str, Any], title: str) -> Figure:
    """Returns the shares of the weights' energy, and below, for each metric, what each change loses."""
    gains: dict[str, dict[str, dict[str, float]]] = found["gain"]
    metrics = list(next(iter(gains.values())))
    figure = Figure(figsize=(8.0, 1.6 + 2.0 * len(metrics)), layout="constrained")
    figure.suptitle(title)
    rows: Any = figure.subplots(1 + len(metrics), 1, height_ratios=[0.5, *[1.0] * len(metrics)])
    left = 0.0
    for part in PARTS:
        share = found["shares"][part]
        label = f"{NAMES[part]}: {percent(share)}"
        rows[0].barh([0.0], [share], left=left, color=COLOURS[part], label=label)
        left += share
    rows[0].set(xlim=(0, 1), yticks=[], xlabel="share of the energy |\u0394W|\u00b2")
    rows[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize="small")
    for axes, metric in zip(rows[1:], metrics, strict=True):
        for place, change in enumerate(reversed(gains)):
            value = gains[change][metric]
            if "low" in value:
                axes.plot([value["low"], value["high"]], [place, place], color="tab:blue")
            axes.plot([value["gain"]], [place], "o", color="tab:blue")
        axes.axvline(0.0, color="0.6", linewidth=0.8)
        axes.set_yticks(range(len(gains)), [*reversed(gains)])
        axes.set(
            ylim=(-0.6, len(gains) - 0.4), xlabel=f"{metric}: own weights less changed ones, 95 % interval"
        )
    return figure


def plot_diversity(methods: Sequence[Diversity], prompts: Sequence[str], title: str) -> Figure:
    """Returns Figure 12: for each of a few prompts a row of images per method, a column per seed."""
    count, seeds = methods[0].shown_RS3HW.shape[:2]
    height = CELL * len(methods) + 0.5
    width = max(LEAST_WIDTH, CELL * seeds + 1.6)
    figure = Figure(figsize=(width, height * count + 0.6), layout="constrained")
    figure.suptitle(title)
    parts: Any = figure.subfigures(count, 1, squeeze=False)
    for row in range(count):
        part = parts[row, 0]
        part.suptitle("\n".join(textwrap.wrap(prompts[row], round(LETTERS * width))[:2]), fontsize="medium")
        grid = part.subplots(len(methods), seeds, squeeze=False)
        for method, line in zip(methods, grid, strict=True):
            _images(line, method.shown_RS3HW[row])
            name = "\n".join(textwrap.wrap(method.name, NAME_LETTERS))
            label = f"{name}\n{float(method.values_P[row]):.3f}"
            line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize="medium")
    return figure


def _images(line: Sequence[Axes], images_S3HW: Tensor) -> None:
    for axes, image in zip(line, images_S3HW, strict=True):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
