"""Scores as tables: CSV, and Parquet where pyarrow is there."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev

from ...errors import HyperAlignError
from .files import Scored, write_whole

Table = dict[str, list[str] | list[float]]
"""Columns by their names."""

COMBINED = "mean z-score"


def combined(rows: Sequence[Scored]) -> list[float]:
    """Returns what images are ranked by: their score, or with several rewards the mean of its z-scores.

    A z-score is (s - mean) / std over these very images; a reward that is alike for all adds nothing.
    """
    names = list(rows[0].scores) if rows else []
    if len(names) == 1:
        return [row.scores[names[0]] for row in rows]
    columns = [_z_scores([row.scores[name] for row in rows]) for name in names]
    return [fmean(values) for values in zip(*columns, strict=True)]


def _z_scores(scores: Sequence[float]) -> list[float]:
    mean, deviation = fmean(scores), pstdev(scores)
    return [(score - mean) / deviation if deviation > 0.0 else 0.0 for score in scores]


def columns(rows: Sequence[Scored], rewards: Sequence[str]) -> Table:
    """Returns name, prompt, each reward's scores and, with several rewards, what they are ranked by."""
    table: Table = {"name": [row.name for row in rows], "prompt": [row.prompt for row in rows]}
    table |= {reward: [row.scores[reward] for row in rows] for reward in rewards}
    return table if len(rewards) == 1 else table | {COMBINED: combined(rows)}


def writer(path: Path) -> Callable[[Table], None]:
    """Returns what writes a table to a path, atomically.

    Raises HyperAlignError on a name of another kind, or on .parquet without pyarrow.
    """
    match path.suffix.lower():
        case ".csv":
            return lambda table: write_whole(path, lambda partial: _write_csv(partial, table))
        case ".parquet" if importlib.util.find_spec("pyarrow") is not None:
            return lambda table: write_whole(path, lambda partial: _write_parquet(partial, table))
        case ".parquet":
            raise HyperAlignError(f"{path.name} needs pyarrow; run `pip install pyarrow`, or write a .csv.")
        case _:
            raise HyperAlignError(f"--out is {path.name}; expected a name ending in .csv or .parquet.")


def _write_csv(path: Path, table: Table) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(table)
        lines.writerows(zip(*table.values(), strict=True))


def _write_parquet(path: Path, table: Table) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(table), path)
