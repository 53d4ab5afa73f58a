"""Files of votes, checked against the key of their study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import HyperAlignError
from .trials import Key, Trial, read_json

FORMAT, VERSION = "hyperalign-votes", 1
POINTS = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""The points of the first image for an answer; the second has the rest of 1."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One rater's answer to one question on one pair."""

    rater: str
    trial: Trial
    question: str
    answer: str


def read_votes(paths: Sequence[Path], key: Key) -> list[Vote]:
    """Reads the votes of all raters.

    Files of one rater may overlap; equal answers count once.

    Raises HyperAlignError on another kind of file or a file of another study, on unknown answers, on two
    different answers of one rater, and if there is no vote at all.
    """
    found: dict[tuple[str, str, str], tuple[str, Path]] = {}
    trials = {trial.id: trial for trial in key.trials}
    for path in paths:
        for rater, trial, question, answer in _answers(path, key, trials):
            before, where = found.setdefault((rater, trial, question), (answer, path))
            if before != answer:
                raise HyperAlignError(
                    f"{path} and {where} are of one rater ({rater}) and differ on the pair {trial}; keep one "
                    "of them."
                )
    if not found:
        raise HyperAlignError(f"There is no vote in {', '.join(map(str, paths))}; save votes from the page.")
    return [Vote(rater, trials[t], question, answer) for (rater, t, question), (answer, _) in found.items()]


def _answers(path: Path, key: Key, trials: dict[str, Trial]) -> Iterator[tuple[str, str, str, str]]:
    if not path.is_file():
        raise HyperAlignError(f"There is no file of votes {path}; give a file that the page saved.")
    content = read_json(path)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise HyperAlignError(f"{path} is no file of votes; give a file that the page's Save button wrote.")
    if content.get("study") != key.study:
        raise HyperAlignError(
            f"{path} has votes of the study {content.get('study')}, but the key is of {key.study} "
            f"({key.title!r}); give the key of that study."
        )
    votes: Any = content.get("votes")
    if not isinstance(votes, dict) or not isinstance(content.get("rater"), str):
        raise HyperAlignError(f"{path} is damaged: it has no votes or no rater. Save it again from the page.")
    for trial, answers in votes.items():
        for question, answer in (answers if isinstance(answers, dict) else {"?": answers}).items():
            if trial not in trials or question not in key.questions or answer not in POINTS:
                raise HyperAlignError(
                    f"{path} is damaged: {answer!r} to {question!r} on the pair {trial!r} is no answer of "
                    "this study. Save it again from the page."
                )
            yield content["rater"], trial, question, answer
