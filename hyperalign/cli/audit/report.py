"""Findings as text, CSV, JSON and a plain HTML page."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..score.images import BadImage
from .findings import Finding
from .statistics import FEWEST, LEVEL, Estimate, Gap

COLUMNS = ("reward", "finding", "figure", "group", "images", "value", "low", "high")
CAVEATS = (
    "A gap is a question, not a verdict: images of two groups may differ in quality, style or generator. "
    "Make the groups alike in everything else (same generator, seeds, prompt) before you blame the reward.",
    "No gap is no proof of fairness: it may be there for groups, prompts and styles that are not here.",
    "Intervals are of 95 % for one figure; those of gaps hold for all pairs of their table at once. Of many "
    "tables some will show a gap by chance.",
    "Groups say how images were labelled or prompted, not who anybody is.",
)
STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #8884; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { width: 12rem; height: 1rem; overflow: visible; }
.gap { margin: .3rem 0; } .clear { font-weight: 600; }
"""


def by_size(findings: Sequence[Finding]) -> list[tuple[Finding, Gap]]:
    """Returns the findings with gaps, the largest first: those that are clear before the others."""
    gaps = [(finding, finding.gap) for finding in findings if finding.gap is not None]
    return sorted(gaps, key=lambda pair: (not pair[1].size.is_clear, -pair[1].spreads))


def number(estimate: Estimate) -> str:
    """Returns a figure with its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.4f} ({'too few' if estimate.count <= FEWEST else 'all alike'})"
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def gap_text(gap: Gap) -> str:
    """Returns a gap in a sentence."""
    said = "clear" if gap.size.is_clear else "may be chance"
    spreads = f"{gap.spreads:.2f} standard deviations of the scores; " if gap.spreads else ""
    return f"{gap.highest} above {gap.lowest} by {number(gap.size)}: {spreads}{said}"


def text(findings: Sequence[Finding]) -> str:
    """Returns the findings as plain tables."""
    lines: list[str] = []
    for finding in findings:
        lines += ["", f"{finding.reward} | {finding.title} ({finding.figure})"]
        width = max((len(name) for name in finding.lines), default=0)
        lines += [f"  {name:{width}}  {number(e)}  n={e.count}" for name, e in finding.lines.items()]
        lines += [f"  largest gap: {gap_text(finding.gap)}"] if finding.gap else []
    return "\n".join([*lines, "", *(f"* {caveat}" for caveat in CAVEATS)]).lstrip()


def csv_text(findings: Sequence[Finding]) -> str:
    """Returns one line a figure, gaps among them."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(COLUMNS)
    for finding in findings:
        named = dict(finding.lines)
        if finding.gap:
            named[f"largest gap: {finding.gap.highest} above {finding.gap.lowest}"] = finding.gap.size
        for name, e in named.items():
            writer.writerow(
                (finding.reward, finding.title, finding.figure, name, e.count, e.value, e.low, e.high)
            )
    return stream.getvalue()


def json_text(findings: Sequence[Finding], settings: dict[str, Any]) -> str:
    """Returns everything, with what was asked for."""
    table = {"settings": settings, "level": LEVEL, "caveats": CAVEATS}
    return json.dumps(table | {"findings": [asdict(finding) for finding in findings]}, indent=1) + "\n"


def html_text(title: str, findings: Sequence[Finding], bad: Sequence[BadImage]) -> str:
    """Returns a page that needs no other file and no network, the largest gaps first."""
    gaps = [f"<li>{_marked(finding, gap)}</li>" for finding, gap in by_size(findings)]
    parts = [
        "<!DOCTYPE html>\n<html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>",
        "".join(f"<p>{html.escape(caveat)}</p>" for caveat in CAVEATS),
        f"<h2>Largest gaps</h2><ol>{''.join(gaps)}</ol>" if gaps else "",
        *(part for finding in findings for part in _table(finding)),
        f"<h2>{len(bad)} images were left out</h2>" if bad else "",
        "".join(f"<p>{html.escape(one.name)}: {html.escape(one.reason)}</p>" for one in bad),
        "</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _marked(finding: Finding, gap: Gap) -> str:
    kind = "clear" if gap.size.is_clear else "chance"
    said = html.escape(f"{finding.reward} | {finding.title}: {gap_text(gap)}")
    return f'<span class="{kind}">{said}</span>'


def _table(finding: Finding) -> Iterator[str]:
    yield f"<h2>{html.escape(f'{finding.reward} | {finding.title}')}</h2>"
    yield f"<table><tr><th>group<th>images<th>{html.escape(finding.figure)} [95 %]<th></tr>"
    ends = [end for e in finding.lines.values() for end in (e.value, e.low, e.high) if end is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    for name, e in finding.lines.items():
        yield (
            f"<tr><td>{html.escape(name)}<td class=n>{e.count}<td class=n>{html.escape(number(e))}"
            f"<td>{_whisker(e, low, high)}</tr>"
        )
    yield "</table>"
    if finding.gap:
        yield f"<p class=gap>Largest gap: {_marked(finding, finding.gap)}</p>"


def _whisker(e: Estimate, low: float, high: float) -> str:
    """Returns the figure as a dot on its interval, from the least end of the table to the greatest."""
    width = high - low or 1.0
    left, middle, right = (
        100 * ((e.value if end is None else end) - low) / width for end in (e.low, e.value, e.high)
    )
    return (
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden=true>'
        f'<line x1="{left:.1f}" x2="{right:.1f}" y1="5" y2="5" stroke="currentColor" stroke-width="1"/>'
        f'<rect x="{middle - 0.8:.1f}" y="2" width="1.6" height="6" fill="currentColor"/></svg>'
    )
