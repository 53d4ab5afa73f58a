"""Votes as win rates: `python -m hyperalign study results VOTES.json ... --key study.key.json`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from ...files import cannot_write, check_writable, write_text
from ..common.arguments import command_parser
from .intervals import Interval, of_votes
from .trials import Key, read_key
from .votes import POINTS, Vote, read_votes


@dataclass(frozen=True, slots=True)
class Rate:
    """How often a method won on one question; ties count as half."""

    question: str
    method: str
    against: str
    """The other method, or `all others`."""
    rate: float
    interval: Interval
    wins: int
    ties: int
    losses: int
    prompts: int


ALL_OTHERS = "all others"
DESCRIPTION = """Counts the votes of a study.

Ties count as half a win. Intervals are Wilson's if every prompt has one vote; otherwise they are bootstrapped
over the prompts, and at least as wide.
"""


def rates(votes: Sequence[Vote], key: Key) -> list[Rate]:
    """Returns the rates of each pair of methods, and with more than two of each against all others."""
    found: list[Rate] = []
    for question in key.questions:
        answers = [vote for vote in votes if vote.question == question]
        for one, other in combinations(key.methods, 2):
            found += _rate(answers, key, question, one, {other}, other)
        if len(key.methods) > 2:
            for one in key.methods:
                found += _rate(answers, key, question, one, set(key.methods) - {one}, ALL_OTHERS)
    return found


def _rate(
    votes: Iterable[Vote], key: Key, question: str, method: str, others: set[str], against: str
) -> list[Rate]:
    """Returns the rate of a method, in a list that is empty if it has no votes."""
    points: dict[str, list[float]] = defaultdict(list)
    raters: set[str] = set()
    for vote in votes:
        sides = vote.trial.first, vote.trial.second
        if method in sides and others & set(sides):
            won = POINTS[vote.answer]
            points[vote.trial.prompt or vote.trial.name].append(won if sides[0] == method else 1 - won)
            raters.add(vote.rater)
    everything = [won for prompt in points.values() for won in prompt]
    if not everything:
        return []
    counts = Counter(everything)
    rate = sum(everything) / len(everything)
    interval = of_votes(points, key.seed)
    return [
        Rate(question, method, against, rate, interval, counts[1.0], counts[0.5], counts[0.0], len(points))
    ]


def report(votes: Sequence[Vote], key: Key) -> dict[str, object]:
    """Returns all results for the JSON file."""
    chosen = Counter(vote.answer for vote in votes)
    decided = chosen["first"] + chosen["second"]
    return {
        "study": key.study,
        "title": key.title,
        "raters": len({vote.rater for vote in votes}),
        "votes": len(votes),
        "of": len(key.trials) * len(key.questions) * len({vote.rater for vote in votes}),
        "first_chosen": round(chosen["first"] / decided, 4) if decided else None,
        "rates": [asdict(rate) for rate in rates(votes, key)],
    }


def table(votes: Sequence[Vote], key: Key) -> str:
    """Returns the rates as a text table."""
    rows: list[tuple[str, ...]] = [
        ("question", "method", "against", "win rate", "95 %", "won", "tied", "lost", "prompts")
    ]
    for rate in rates(votes, key):
        interval = f"{rate.interval.low:.1%} to {rate.interval.high:.1%}"
        numbers = (rate.wins, rate.ties, rate.losses, rate.prompts)
        rows.append(
            (rate.question, rate.method, rate.against, f"{rate.rate:.1%}", interval, *map(str, numbers))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    found = report(votes, key)
    head = f"{key.title}: {found['votes']} of {found['of']} votes of {found['raters']} raters"
    return "\n".join([head, *(line.rstrip() for line in lines)])


def run(arguments: Sequence[str]) -> str:
    """Counts the votes of a command line and returns the table. Raises HyperAlignError."""
    parser = command_parser("study results", DESCRIPTION)
    parser.add_argument("votes", nargs="+", type=Path, metavar="VOTES.json", help="files that the page saved")
    parser.add_argument("--key", required=True, type=Path, metavar="FILE",
        help="the study's .key.json, or the page beside it")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write the results to")
    options = parser.parse_args(arguments)
    key = read_key(options.key)
    votes = read_votes(options.votes, key)
    if options.out is not None:
        check_writable(options.out)
        text = json.dumps(report(votes, key), indent=2, ensure_ascii=False) + "\n"
        with cannot_write(options.out, "Free some space, or choose another --out."):
            write_text(options.out, text)
    return table(votes, key)
