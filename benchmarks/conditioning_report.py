"""Tables and figures of benchmarks.conditioning, from the scores of every validation prompt's images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.evaluation.table import Metric, Numbers, mean_of_means

METRICS = {"geneval": "GenEval", "validation_reward": "validation reward"}
CONDITIONAL = ("I", "P", "S")
Row = Mapping[str, Any]
Values = Mapping[str, Sequence[float] | Numbers]


def difference(own: Values, other: Values, strata: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns by figure the value and the paired difference to another's with its 95 % interval."""
    found: dict[str, dict[str, float]] = {}
    for name in METRICS:
        both = {"own": np.asarray(own[name]), "other": np.asarray(other[name])}
        metric = Metric(name, both, strata.get(name, ()))
        paired = metric.difference("own", "other")
        interval = {} if paired.interval is None else paired.interval._asdict()
        found[name] = {"value": metric.value("own"), "gain": paired.value, **interval}
    return found


def best(rows: Sequence[Row]) -> list[Row]:
    """Returns, by rank, palettes and steps, each method's row at its best learning rate by GenEval."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (*_place(row), row["method"])
        if key not in found or value_of(row) > value_of(found[key]):
            found[key] = row
    return list(found.values())


def value_of(row: Row) -> float:
    """Returns a row's GenEval."""
    values = np.asarray(row["scores"]["geneval"])
    return float(mean_of_means(*(values[list(group)] for group in row["strata"]["geneval"])))


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns rows with their gains over the base, and S's over them, in place of scores."""
    of_s = {_place(row): row["scores"] for row in best(rows) if row["method"] == "S"}
    found: list[dict[str, Any]] = []
    for row in rows:
        kept = {key: value for key, value in row.items() if key not in ("scores", "base", "strata")}
        scores, strata = row["scores"], row["strata"]
        kept["metrics"] = difference(scores, row["base"], strata)
        rival = of_s.get(_place(row))
        if rival is not None and row["method"] != "S":
            kept["gain_of_s"] = difference(rival, scores, strata)
        found.append(kept)
    return found


def _place(row: Row) -> tuple[int, int, int]:
    return row["rank"], row["palettes"], row["steps"]


def over_seeds(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns a row for each method and number of steps, whose scores are the means over its seeds."""
    found: list[dict[str, Any]] = []
    for method, steps in dict.fromkeys((row["method"], row["steps"]) for row in rows):
        own = [row for row in rows if (row["method"], row["steps"]) == (method, steps)]
        scores = {name: np.mean([row["scores"][name] for row in own], axis=0).tolist() for name in METRICS}
        found.append(
            dict(own[0])
            | {"scores": scores, "seed": [row["seed"] for row in own], "curve": [row["curve"] for row in own]}
            | {"of_seeds": [value_of(row) for row in own]}
        )
    return found


def headroom(finals: Sequence[Row], oracle: Values) -> list[dict[str, Any]]:
    """Returns the gains over the base of the finalists and of the oracle, on the oracle's prompts."""
    if not finals or not oracle:
        return []
    count = len(oracle["geneval"])
    families = [[n for n in group if n < count] for group in finals[0]["strata"]["geneval"]]
    strata = {"geneval": [family for family in families if family]}
    base = first(finals[0]["base"], count)
    sets = {_finalist(row): first(row["scores"], count) for row in finals} | {"one LoRA a prompt": oracle}
    return [
        {"method": method, "prompts": count, "metrics": difference(scores, base, strata)}
        for method, scores in sets.items()
    ]


def _finalist(row: Row) -> str:
    return f"{row['method']}, {row['steps']} steps"


def first(scores: Values, count: int) -> dict[str, Numbers]:
    """Returns the scores of the first prompts."""
    return {name: np.asarray(values)[:count] for name, values in scores.items()}


def report_of(found: Sequence[Row], finals: Sequence[Row], oracle: Values) -> dict[str, Any]:
    """Returns what the tables and figures show."""
    finalists = over_seeds(finals)
    return {
        "rates": summaries(found),
        "cells": summaries(best(found)),
        "finalists": summaries(finalists),
        "oracle": headroom(finalists, oracle),
    }


def curve_of(log: Path) -> list[dict[str, Any]]:
    """Returns the validation figures of a run by step."""
    curve: list[dict[str, Any]] = []
    for text in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        measured = {0: row.get("baseline"), row["step"] + 1: row.get("validation")}
        curve += [
            {
                "step": step,
                "geneval": found["geneval"]["overall"],
                "validation_reward": found["validation_reward"],
            }
            for step, found in measured.items()
            if found
        ]
    return curve


def tables(report: Mapping[str, Any]) -> str:
    """Returns the tables in Markdown: all cells, the finalists, and the oracle."""
    heads = "GenEval | S above it | validation reward | S above it |"
    lines = [
        f"| corrections | rank | method | trained numbers | lr | {heads}",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line([row["corrections"], row["rank"], *_front(row)], row) for row in report["cells"]]
    lines += ["", f"| finalist | trained numbers | lr | GenEval by seed | {heads}"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in report["finalists"]:
        values = ", ".join(f"{value:.3f}" for value in row["of_seeds"])
        lines.append(_line([_finalist(row), *_front(row)[1:], values], row))
    if report["oracle"]:
        lines += ["", "| on the oracle's prompts | GenEval | validation reward |", "|---|---|---|"]
    for row in report["oracle"]:
        lines.append(
            f"| {row['method']} | " + " | ".join(gain(row["metrics"][name]) for name in METRICS) + " |"
        )
    return "\n".join(lines)


def _front(row: Row) -> list[str]:
    return [row["method"], f"{row['trained_numbers'] / 1e3:.0f}k", f"{row['rate']:g}"]


def _line(front: Sequence[Any], row: Row) -> str:
    cells = list(map(str, front))
    for name in METRICS:
        cells += [gain(row["metrics"][name]), gain(row["gain_of_s"][name]) if "gain_of_s" in row else ""]
    return "| " + " | ".join(cells) + " |"


def gain(found: Mapping[str, float]) -> str:
    """Returns a gain with its interval, in bold where that excludes zero."""
    if "low" not in found:
        return f"{found['gain']:+.2f}"
    text = f"{found['gain']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"**{text}**" if not found["low"] <= 0.0 <= found["high"] else text


def plot(rows: Sequence[Row]) -> Figure:
    """Returns the gain over the base in both figures, against the number of corrections and the rank."""
    figure = Figure(figsize=(9.5, 7.0), layout="constrained")
    pairs = [("corrections", "rank"), ("rank", "corrections")]
    shown = [pair for pair in pairs if len({row[pair[0]] for row in rows}) > 1] or pairs[:1]
    panels = figure.subplots(2, len(shown), sharey="row", squeeze=False)
    for line, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for axes, (varied, fixed) in zip(line, shown, strict=True):
            _panel(axes, rows, metric, varied, fixed)
        line[0].set_ylabel(f"gain in {title} over the base")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _panel(axes: Axes, rows: Sequence[Row], metric: str, varied: str, fixed: str) -> None:
    """Draws every method where `fixed` has the value at which `varied` has most."""
    values = sorted({row[varied] for row in rows})
    at = max({row[fixed] for row in rows}, key=lambda v: len({r[varied] for r in rows if r[fixed] == v}))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for place, method in enumerate(methods):
        shown = [row for row in rows if row["method"] == method and row[fixed] == at]
        shown.sort(key=lambda row: row[varied])
        found = [row["metrics"][metric] for row in shown]
        shift = 0.05 * (place - (len(methods) - 1) / 2)  # so that intervals do not cover each other
        axes.errorbar(
            [values.index(row[varied]) + shift for row in shown], [m["gain"] for m in found],
            yerr=[[m["gain"] - m["low"] for m in found], [m["high"] - m["gain"] for m in found]],
            label=method, color=f"C{place}", linestyle="-" if method in CONDITIONAL else "--", marker="o",
            markersize=4, capsize=2,
        )  # fmt: skip
    axes.set_xticks(range(len(values)), list(map(str, values)))
    axes.set_xlabel(f"{varied} ({fixed} {at})")
    axes.axhline(0, color="0.8", linewidth=0.8)
    axes.grid(alpha=0.3)


def plot_curves(rows: Sequence[Row]) -> Figure:
    """Returns the finalists' validation figures by training step, a line a seed."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axes, (metric, title) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
        for row in rows:
            longest = row["steps"] == max(other["steps"] for other in rows)
            for number, curve in enumerate(row["curve"]):
                axes.plot(
                    [at["step"] for at in curve], [at[metric] for at in curve], marker="o", markersize=3,
                    color=f"C{methods.index(row['method'])}", linestyle="--" if longest else "-",
                    label=_finalist(row) if number == 0 else None,
                )  # fmt: skip
        axes.set_xlabel("training step")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure
