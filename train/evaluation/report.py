"""The files of a report: the table as Markdown, CSV and JSON, scores of images and prompts, and a page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hyperalign.errors import HyperAlignError
from hyperalign.files import cannot_write, write_text
from hyperalign.image_files import thumbnail
from hyperalign.image_sets import ImageSet
from hyperalign.pages import render
from hyperalign.threads import Threads
from train.evaluation.image_sets import Metadata
from train.evaluation.scorers import CORRECT
from train.evaluation.table import Cell, Column, Metric, Numbers

TEMPLATE = Path(__file__).with_name("report.html")
RETRY = "Free some space or choose another --out; the values so far are kept, and the same command resumes."


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a report says; the first set is the base."""

    sets: dict[str, ImageSet]
    metadata: list[Metadata]
    scores: dict[str, dict[str, Numbers]]
    """By what scored and by set: the value of every image (P, S)."""
    metrics: list[Metric]
    columns: list[Column]
    notes: list[str]
    """What a reader of the table has to know."""
    settings: dict[str, Any]

    @property
    def base(self) -> str:
        """The set that the others are compared with."""
        return next(iter(self.sets))


@dataclass(frozen=True, slots=True)
class Grid:
    """Which images the page shows: all sets of some prompts, spread over the list."""

    prompts: int
    seeds: int
    side: int
    """Pixels of the longer side."""

    def rows(self, count: int) -> list[int]:
        """Returns the prompts' indices, of `count` prompts."""
        shown = min(self.prompts, count)
        return [index * count // shown for index in range(shown)]


def write_report(report: Report, folder: Path, grid: Grid, threads: int) -> list[Path]:
    """Writes all files, each whole or not at all, and returns their paths. Raises HyperAlignError."""
    contents = {
        "table.md": markdown(report),
        "table.csv": _csv(_table_rows(report)),
        "images.csv": _csv(_image_rows(report)),
        "prompts.csv": _csv(_prompt_rows(report)),
        "report.json": json.dumps(_summary(report), indent=1, ensure_ascii=False) + "\n",
        "report.html": page(report, grid, threads),
    }
    for name, content in contents.items():
        with cannot_write(folder / name, RETRY):
            write_text(folder / name, content, errors="backslashreplace")
    return [folder / name for name in contents]


def markdown(report: Report) -> str:
    """Returns the table and that of the differences."""
    header = ["method", *(column.name for column in report.columns)]
    means = [[_escaped(name), *(_mean(column, name) for column in report.columns)] for name in report.sets]
    changes = [
        [_escaped(name), *(_change(column, name) for column in report.columns)]
        for name in report.sets
        if name != report.base
    ]
    parts = [_markdown_table(header, means), *report.notes]
    if changes:
        explained = (
            f"Differences to {_escaped(report.base)} on the same prompts and seeds, with 95 % bootstrap "
            "intervals over prompts; * where the interval excludes zero:"
        )
        parts += [explained, _markdown_table(header, changes)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Returns a text that Markdown shows as it is in a table."""
    return "".join(f"\\{letter}" if letter in "\\|*_`<[" else letter for letter in text)


def _mean(column: Column, name: str) -> str:
    cell = column.cells[name]
    if cell is None:
        return ""
    text = f"{cell.value:.{column.digits}f}"
    return f"**{text}**" if cell.is_best else text


def _change(column: Column, name: str) -> str:
    cell = column.cells[name]
    found = None if cell is None else cell.difference
    if found is None:
        return ""
    text = f"{found.value:+.{column.digits}f}"
    if found.interval is None:
        return text
    low, high = (f"{end:+.{column.digits}f}" for end in found.interval)
    return f"{text} [{low}, {high}]{'*' if found.is_significant else ''}"


def _table_rows(report: Report) -> list[list[object]]:
    """Returns a row a set: the means, and the differences with the ends of their intervals."""
    header: list[object] = ["method"]
    for column in report.columns:
        header.append(column.name)
        if any(cell is not None and cell.difference is not None for cell in column.cells.values()):
            header += [f"{column.name} {part}" for part in ("difference", "low", "high")]
    rows: list[list[object]] = [header]
    for name in report.sets:
        row: dict[str, Any] = {"method": name}
        for column in report.columns:
            row |= _cell_values(column.name, column.cells[name])
        rows.append([row.get(str(key), "") for key in header])
    return rows


def _cell_values(name: str, cell: Cell | None) -> dict[str, Any]:
    if cell is None:
        return {}
    values: dict[str, Any] = {name: cell.value}
    if (found := cell.difference) is not None:
        values[f"{name} difference"] = found.value
        if found.interval is not None:
            values[f"{name} low"], values[f"{name} high"] = found.interval
    return values


def _image_rows(report: Report) -> list[list[object]]:
    """Returns a row an image with its scores."""
    names = list(report.scores)
    rows: list[list[object]] = [["method", "prompt index", "seed index", "file", "prompt", "tag", *names]]
    for method, images in report.sets.items():
        for number, (line, paths) in enumerate(zip(report.metadata, images.images, strict=True)):
            for seed, path in enumerate(paths):
                scores = [float(report.scores[name][method][number, seed]) for name in names]
                rows.append(
                    [method, number, seed, path.relative_to(images.folder).as_posix(), line["prompt"],
                     line.get("tag", ""), *scores]
                )  # fmt: skip
    return rows


def _prompt_rows(report: Report) -> list[list[object]]:
    """Returns a row a set and prompt with the means over its seeds: what the bootstrap resamples."""
    chosen = [metric for metric in report.metrics if not metric.strata]
    rows: list[list[object]] = [
        ["method", "prompt index", "prompt", "tag", *(metric.name for metric in chosen)]
    ]
    for method in report.sets:
        for number, line in enumerate(report.metadata):
            means = [float(metric.prompts[method][number]) for metric in chosen]
            rows.append([method, number, line["prompt"], line.get("tag", ""), *means])
    return rows


def _csv(rows: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _summary(report: Report) -> dict[str, Any]:
    """Returns the table with what it was made from."""
    return {
        "settings": report.settings,
        "notes": report.notes,
        "base": report.base,
        "sets": {
            name: {"folder": str(one.folder), "generated by": one.name} for name, one in report.sets.items()
        },
        "columns": {
            column.name: {
                name: None if cell is None else _cell_values("value", cell)
                for name, cell in column.cells.items()
            }
            for column in report.columns
        },
    }


def page(report: Report, grid: Grid, threads: int) -> str:
    """Returns the page: the table, and images of all sets side by side. It needs no other file."""
    rows = grid.rows(len(report.metadata))
    seeds = range(min(grid.seeds, len(next(iter(report.sets.values())).images[0])))
    places = [(name, number, seed) for number in rows for name in report.sets for seed in seeds]
    paths = [report.sets[name].images[number][seed] for name, number, seed in places]
    with Threads(threads) as decoders:
        found = decoders.in_order(partial(_thumbnail, grid.side), paths, ahead=2 * threads)
        uris = [uri for _, uri in found]
    shown = dict(zip(places, uris, strict=True))
    return render(
        TEMPLATE,
        title=" / ".join(report.sets),
        report=report,
        change=_change,
        caption=partial(_caption, report),
        rows=rows,
        seeds=list(seeds),
        side=grid.side,
        shown=shown,
    )


def _thumbnail(side: int, path: Path) -> str:
    uri = thumbnail(path.parent, path.name, side)
    if isinstance(uri, str):
        return uri
    raise HyperAlignError(f"{path} could be read before, but now {uri.reason}. Run the same command again.")


def _caption(report: Report, method: str, number: int, seed: int) -> str:
    """Returns the scores of an image as a line."""
    parts: list[str] = []
    for name, sets in report.scores.items():
        value = float(sets[method][number, seed])
        parts.append(("correct" if value else "wrong") if name == CORRECT else f"{name} {value:.4f}")
    return " · ".join(parts)
