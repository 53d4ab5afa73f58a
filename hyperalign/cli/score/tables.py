"""Tables of scores: CSV, and Parquet if pyarrow is installed."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

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
    scores_RN = np.array([[row.scores[name] for row in rows] for name in names], dtype=np.float64)
    if len(names) < 2:
        return scores_RN.flatten().tolist()
    with np.errstate(invalid="ignore"):
        z_scores_RN: Any = stats.zscore(scores_RN, axis=1)
    return np.nan_to_num(z_scores_RN).mean(axis=0).tolist()  # the z-scores of equal scores are NaN


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
