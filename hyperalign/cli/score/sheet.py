"""A contact sheet: one HTML file with all thumbnails in it, the best image first."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from .files import Scored
from .images import BadImage
from .tables import COMBINED, combined

STYLE = """
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 110rem; }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; }
p { margin: .25rem 0; }
fieldset { border: 0; margin: .75rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(11rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; content-visibility: auto; contain-intrinsic-size: auto 18rem; }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #8882; }
figcaption { overflow-wrap: anywhere; font-size: .85rem; }
b { font-variant-numeric: tabular-nums; }
small { opacity: .75; display: block; }
.prompt { display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical; overflow: hidden; }
"""

SCRIPT = """
for (const choice of document.querySelectorAll("input[name=sort]")) choice.onchange = () => {
  const main = document.querySelector("main");
  const score = (figure) => JSON.parse(figure.dataset.scores)[choice.value];
  main.append(...[...main.children].sort((a, b) => score(b) - score(a)));
};
"""


def best_first(rows: Sequence[Scored]) -> list[Scored]:
    """Returns images by falling score; equals keep their order."""
    ranked = sorted(zip(combined(rows), range(len(rows)), strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [rows[index] for _, index in ranked]


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
        bad: images that were left out.
    """
    ranks = dict(zip((row.name for row in rows), combined(rows), strict=True))
    shown = [row for row in best_first(rows) if row.name in thumbnails]
    rewards = list(rows[0].scores) if rows else []
    parts = [
        "<!DOCTYPE html>\n<html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        *_summary(rows, rewards, len(shown)),
        *_choices(rewards),
        "<main>",
        *(_figure(place, row, thumbnails[row.name], ranks[row.name]) for place, row in enumerate(shown, 1)),
        "</main>",
        *_left_out(bad),
        f"<script>{SCRIPT}</script>" if len(rewards) > 1 else "",
        "</html>\n",
    ]
    return "\n".join(parts)


def _summary(rows: Sequence[Scored], rewards: Sequence[str], shown: int) -> Iterator[str]:
    which = "all of them" if shown == len(rows) else f"the best {shown} of them"
    yield f"<p>{len(rows)} images scored; {which} below, the best first.</p>"
    for reward in rewards:
        scores = [row.scores[reward] for row in rows]
        yield (
            f"<p><b>{html.escape(reward)}</b>: mean {fmean(scores):.4f}, "
            f"{min(scores):.4f} to {max(scores):.4f}</p>"
        )


def _choices(rewards: Sequence[str]) -> Iterator[str]:
    if len(rewards) < 2:
        return
    names = enumerate([COMBINED, *rewards])
    options = (
        f'<label><input type=radio name=sort value="{index}"{" checked" if index == 0 else ""}> '
        f"{html.escape(name)}</label>"
        for index, name in names
    )
    yield f"<fieldset><span>Sort by</span>{''.join(options)}</fieldset>"


def _figure(place: int, row: Scored, thumbnail: str, rank: float) -> str:
    name, prompt = html.escape(row.name), html.escape(row.prompt)
    scores = " · ".join(f"{html.escape(reward)} {score:.4f}" for reward, score in row.scores.items())
    headline = f"{rank:.4f}" if len(row.scores) == 1 else f"{rank:+.2f}"
    values = [rank, *row.scores.values()]
    return (
        f'<figure data-scores="{html.escape(str(values))}">'
        f'<img src="{thumbnail}" alt="{name}" loading=lazy decoding=async>'
        f"<figcaption>{place}. <b>{headline}</b>"
        + (f"<small>{scores}</small>" if len(row.scores) > 1 else "")
        + f'<small>{name}</small><span class=prompt title="{prompt}">{prompt}</span></figcaption></figure>'
    )


def _left_out(bad: Sequence[BadImage]) -> Iterator[str]:
    if bad:
        lines = "".join(f"<li>{html.escape(one.name)}: {html.escape(one.reason)}</li>" for one in bad)
        yield f"<details open><summary>{len(bad)} images were left out</summary><ul>{lines}</ul></details>"
