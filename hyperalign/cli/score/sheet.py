"""A contact sheet: one HTML file with all thumbnails in it, the best image first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from ...image_files import BadImage
from ...pages import render
from .scoring import Scored
from .tables import MEAN_Z_SCORE, ranking_scores

TEMPLATE = Path(__file__).with_name("sheet.html")


def best_first(rows: Sequence[Scored]) -> list[Scored]:
    """Returns images by descending score; equal ones keep their order."""
    ranks = ranking_scores(rows)
    return [rows[index] for index in sorted(range(len(rows)), key=lambda index: -ranks[index])]


def contact_sheet(
    title: str,
    rows: Sequence[Scored],
    thumbnails: Mapping[str, str],
    bad: Sequence[BadImage],
) -> str:
    """Returns the page, which needs no other file and no network.

    Args:
        title: its heading.
        rows: all images that were scored.
        thumbnails: data URIs by the images' names; only these images are shown.
        bad: images that were skipped.
    """
    ranks = dict(zip((row.name for row in rows), ranking_scores(rows), strict=True))
    rewards = list(rows[0].scores) if rows else []
    scores = {reward: [row.scores[reward] for row in rows] for reward in rewards}
    return render(
        TEMPLATE,
        title=title,
        count=len(rows),
        summary={reward: (fmean(values), min(values), max(values)) for reward, values in scores.items()},
        sortings=[MEAN_Z_SCORE, *rewards] if len(rewards) > 1 else [],
        figures=[
            {
                "row": row,
                "rank": ranks[row.name],
                "sorting_scores": [ranks[row.name], *row.scores.values()],
                "thumbnail": thumbnails[row.name],
            }
            for row in best_first(rows)
            if row.name in thumbnails
        ],
        bad=bad,
    )
