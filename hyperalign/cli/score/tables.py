"""Tables of scores: CSV, and Parquet if pyarrow is installed."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev

from ...errors import HyperAlignError
from ...files import cannot_write, replacing
from ..common.log import SCORES_ARE_KEPT
from .scoring import Scored

Table = dict[str, list[str] | list[float]]
"""Columns by their names."""

MEAN_Z_SCORE = "mean z-score"


def ranking_scores(rows: Sequence[Scored]) -> list[float]:
    """Returns the scores by which images are ranked: of one reward its scores, of several the mean z-scores.

    A z-score is (s - mean) / std over these images; a reward that is equal for all of them contributes 0.
    """
    names = list(rows[0].scores) if rows else []
    if len(names) == 1:
        return [row.scores[names[0]] for row in rows]
    z_scores = [_z_scores([row.scores[name] for row in rows]) for name in names]
    return [fmean(values) for values in zip(*z_scores, strict=True)]


def _z_scores(scores: Sequence[float]) -> list[float]:
    """Returns z-scores; the standard library's exact deviation of equal scores is 0, unlike NumPy's."""
    mean, deviation = fmean(scores), pstdev(scores)
    return [(score - mean) / deviation if deviation > 0.0 else 0.0 for score in scores]


def columns(rows: Sequence[Scored], rewards: Sequence[str]) -> Table:
    """Returns name, prompt, the scores of each reward and, of several rewards, the mean z-score."""
    table: Table = {"name": [row.name for row in rows], "prompt": [row.prompt for row in rows]}
    table |= {reward: [row.scores[reward] for row in rows] for reward in rewards}
    return table if len(rewards) == 1 else table | {MEAN_Z_SCORE: ranking_scores(rows)}


def writer(path: Path) -> Callable[[Table], None]:
    """Returns a function that writes a table to a path, atomically.

    Raises HyperAlignError on another file name extension, or on .parquet without pyarrow.
    """
    match path.suffix.lower():
        case ".csv":
            write = _write_csv
        case ".parquet" if importlib.util.find_spec("pyarrow") is not None:
            write = _write_parquet
        case ".parquet":
            raise HyperAlignError(f"{path.name} needs pyarrow; run `pip install pyarrow`, or write a .csv.")
        case _:
            raise HyperAlignError(f"--out is {path.name}; expected a name ending in .csv or .parquet.")

    def replace(table: Table) -> None:
        with cannot_write(path, SCORES_ARE_KEPT), replacing(path) as partial:
            write(partial, table)

    return replace


def _write_csv(path: Path, table: Table) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(table)
        lines.writerows(zip(*table.values(), strict=True))


def _write_parquet(path: Path, table: Table) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(table), path)
