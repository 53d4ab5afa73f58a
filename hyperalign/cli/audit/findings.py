"""The findings of an audit: means by group and by prompt, correlations with pixel properties, and gaps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from .groups import Groups
from .measuring import OWN, Measured
from .pixels import ALTERATIONS
from .statistics import Estimate, Gap, largest_gap, mean, paired, rank_correlation


@dataclass(frozen=True, slots=True)
class Finding:
    """A table of estimates of one metric."""

    reward: str
    title: str
    metric: str
    """The name of the lines' values."""
    lines: dict[str, Estimate]
    gap: Gap | None = None


def findings(
    rows: Sequence[Measured],
    reward: str,
    groups: Groups,
    templates: Mapping[str, Sequence[str]],
    altered: bool,
) -> list[Finding]:
    """Returns all findings on a reward.

    Args:
        rows: one per image.
        reward: its name.
        groups: by attribute, the group of each image.
        templates: the prompts of each template.
        altered: whether alterations were scored.
    """
    found = list(_of_groups(rows, reward, groups, templates))
    for template, texts in templates.items():
        columns = {text: [row.scores[reward][text] for row in rows] for text in texts}
        title = f"the same images under “{template}”"
        found.append(_means(reward, title, columns, same_images=True))
    found.append(_of_pixels(rows, reward))
    if altered:
        found.append(_of_alterations(rows, reward))
    return found


def score_of(row: Measured, reward: str) -> float:
    """Returns an image's score under its own prompt, or else the mean over the templates' prompts."""
    scores = {case: score for case, score in row.scores[reward].items() if case not in ALTERATIONS}
    return scores.get(OWN, fmean(scores.values()))


def by_group(
    rows: Sequence[Measured], members: Mapping[str, str], scores: Sequence[float]
) -> dict[str, list[float]]:
    """Returns scores by group, groups sorted by name."""
    found: dict[str, list[float]] = {name: [] for name in sorted(set(members.values()))}
    for row, score in zip(rows, scores, strict=True):
        if row.name in members:
            found[members[row.name]].append(score)
    return {name: values for name, values in found.items() if values}


def _of_groups(
    rows: Sequence[Measured], reward: str, groups: Groups, templates: Mapping[str, Sequence[str]]
) -> Iterator[Finding]:
    for attribute, members in groups.items():
        if rows and OWN in rows[0].scores[reward]:
            scores = [row.scores[reward][OWN] for row in rows]
            title = f"{attribute}: images by group, each under its own prompt"
            yield _means(reward, title, by_group(rows, members, scores))
        for text in dict.fromkeys(text for texts in templates.values() for text in texts):
            scores = [row.scores[reward][text] for row in rows]
            yield _means(reward, f"{attribute}: images by group, all under “{text}”",
                         by_group(rows, members, scores))  # fmt: skip


def _means(
    reward: str, title: str, columns: Mapping[str, Sequence[float]], same_images: bool = False
) -> Finding:
    lines = {name: mean(values) for name, values in columns.items()}
    return Finding(reward, title, "mean score", lines, largest_gap(dict(columns), same_images))


def _of_pixels(rows: Sequence[Measured], reward: str) -> Finding:
    scores = [score_of(row, reward) for row in rows]
    names = list(rows[0].pixels) if rows else []
    lines = {name: rank_correlation([row.pixels[name] for row in rows], scores) for name in names}
    return Finding(reward, "correlation of the score with pixel properties", "rank correlation", lines)


def _of_alterations(rows: Sequence[Measured], reward: str) -> Finding:
    plain = [row.scores[reward].get(OWN, next(iter(row.scores[reward].values()))) for row in rows]
    lines = {
        name: paired([row.scores[reward][name] for row in rows], plain)
        for name in ALTERATIONS
        if rows and name in rows[0].scores[reward]
    }
    return Finding(reward, "the same images, altered", "mean change of the score", lines)
