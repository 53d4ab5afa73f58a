"""Findings as text, CSV, JSON and a plain HTML page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...image_files import BadImage
from ...pages import render
from .findings import Finding
from .statistics import FEWEST, LEVEL, Estimate, Gap

TEMPLATE = Path(__file__).with_name("report.html")
COLUMNS = ("reward", "finding", "metric", "group", "images", "value", "low", "high")
CAVEATS = (
    "A gap does not prove a bias: images of two groups may differ in quality, style or generator. Make "
    "the groups equal in everything else (same generator, seeds, prompt) before you attribute a gap to the "
    "reward.",
    "The absence of a gap does not prove fairness: other groups, prompts and styles may have one.",
    "Intervals are 95 % confidence intervals for one value; those of gaps hold for all pairs of their table "
    "at once. Of many tables some will show a gap by chance.",
    "Groups record how images were labelled or prompted, not who a person is.",
)


def largest_first(findings: Sequence[Finding]) -> list[tuple[Finding, Gap]]:
    """Returns the findings with gaps by descending effect size, the significant ones before the others."""
    gaps = [(finding, finding.gap) for finding in findings if finding.gap is not None]
    return sorted(gaps, key=lambda pair: (not pair[1].difference.is_significant, -pair[1].effect_size))


def number(estimate: Estimate) -> str:
    """Returns an estimate with its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.4f} ({'too few values' if estimate.count <= FEWEST else 'all equal'})"
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def gap_text(gap: Gap) -> str:
    """Returns a gap in a sentence."""
    significance = "significant" if gap.difference.is_significant else "not significant"
    effect = f"{gap.effect_size:.2f} standard deviations of the scores; " if gap.effect_size else ""
    return f"{gap.highest} above {gap.lowest} by {number(gap.difference)}: {effect}{significance}"


def text(findings: Sequence[Finding]) -> str:
    """Returns the findings as plain tables."""
    lines: list[str] = []
    for finding in findings:
        lines += ["", f"{finding.reward} | {finding.title} ({finding.metric})"]
        width = max((len(name) for name in finding.lines), default=0)
        lines += [f"  {name:{width}}  {number(e)}  n={e.count}" for name, e in finding.lines.items()]
        lines += [f"  largest gap: {gap_text(finding.gap)}"] if finding.gap else []
    return "\n".join([*lines, "", *(f"* {caveat}" for caveat in CAVEATS)]).lstrip()


def csv_text(findings: Sequence[Finding]) -> str:
    """Returns one row per estimate, the gaps included."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(COLUMNS)
    for finding in findings:
        named = dict(finding.lines)
        if finding.gap:
            named[f"largest gap: {finding.gap.highest} above {finding.gap.lowest}"] = finding.gap.difference
        for name, e in named.items():
            writer.writerow(
                (finding.reward, finding.title, finding.metric, name, e.count, e.value, e.low, e.high)
            )
    return stream.getvalue()


def json_text(findings: Sequence[Finding], settings: dict[str, Any]) -> str:
    """Returns everything, with the settings of the audit."""
    table = {"settings": settings, "level": LEVEL, "caveats": CAVEATS}
    return json.dumps(table | {"findings": [asdict(finding) for finding in findings]}, indent=1) + "\n"


def html_text(title: str, findings: Sequence[Finding], bad: Sequence[BadImage]) -> str:
    """Returns a page that needs no other file and no network, the largest gaps first."""
    return render(
        TEMPLATE,
        title=title,
        caveats=CAVEATS,
        gaps=[(finding, gap, gap_text(gap)) for finding, gap in largest_first(findings)],
        tables=[
            (finding, _rows(finding), gap_text(finding.gap) if finding.gap else "") for finding in findings
        ],
        bad=bad,
    )


def _rows(finding: Finding) -> list[dict[str, Any]]:
    """Returns a table's rows with the ends of their intervals in percent of the table's range."""
    ends = [end for e in finding.lines.values() for end in (e.value, e.low, e.high) if end is not None]
    least = min(ends, default=0.0)
    width = max(ends, default=1.0) - least or 1.0
    return [
        {
            "name": name,
            "count": e.count,
            "number": number(e),
            "interval": [
                100 * ((e.value if end is None else end) - least) / width for end in (e.low, e.high)
            ],
            "value": 100 * (e.value - least) / width,
        }
        for name, e in finding.lines.items()
    ]
